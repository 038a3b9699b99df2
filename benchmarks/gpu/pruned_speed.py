"""Images per second of the pruned models, at widths rounded to 8, 16 and 32 and unrounded.

One model call of 64 images; the noise predictions of a sampling run cost a fixed number of such calls.
"""

from __future__ import annotations

import copy
from typing import Any

import gpu_timing
import torch
from end_to_end import SIZES, precision, unet
from gpu_timing import Step, spread
from torch import nn

import diffprune_fast

BATCH = 64
ROUNDINGS = (1, 8, 16, 32)


def time_model(step: Step, model: nn.Module, size: int, name: str) -> dict[str, float]:
    batch = 2 if step.rehearsal else BATCH
    model = model.to(step.device, memory_format=torch.channels_last).eval()
    images = torch.randn(batch, 3, size, size, device=step.device).to(memory_format=torch.channels_last)
    t = torch.full((batch,), 500, device=step.device)
    with torch.inference_mode(), precision(step, name):
        times = spread(step.milliseconds(lambda _: model(images, t).sample, 5))
    return {**times, "images_per_s": batch / times["ms"] * 1e3}


def pruned(model: nn.Module, plan: diffprune_fast.Plan, round_to: int) -> diffprune_fast.PruneResult:
    """Half the MACs, by magnitude: which channels go makes no difference to the speed."""
    scores = diffprune_fast.score(model, None, plan, criterion="magnitude")
    selection = diffprune_fast.select(plan, scores, macs=0.5, round_to=round_to, norm_groups="count")
    return diffprune_fast.prune(copy.deepcopy(model), plan, selection.keep)


def main() -> None:
    step = Step("pruned speed", __doc__.splitlines()[0])
    for model_name in ("cifar",) if step.rehearsal else tuple(SIZES):
        if not step.wants(model_name):
            continue
        size = 8 if step.rehearsal else SIZES[model_name]
        model = unet(step, model_name)
        plan = diffprune_fast.trace(model)
        dense: dict[str, float] = {}
        for name in ("bf16", "tf32"):
            labels: dict[str, Any] = {"operation": "model call", "model": model_name, "dtype": name}
            with step.attempt(**labels, provider="dense"):
                times = time_model(step, model, size, name)
                dense[name] = times["images_per_s"]
                step.row(**labels, provider="dense", macs=1.0, **times, ratio=1.0)
        for round_to in ROUNDINGS:
            provider = f"pruned, rounded to {round_to}" if round_to > 1 else "pruned, unrounded"
            with step.attempt(operation="model call", model=model_name, provider=provider):
                result = pruned(model, plan, round_to)
                for name in ("bf16", "tf32"):
                    times = time_model(step, result.model, size, name)
                    step.row(
                        operation="model call", model=model_name, dtype=name, provider=provider,
                        macs=result.after.macs / result.before.macs, **times,
                        ratio=times["images_per_s"] / dense[name],
                    )  # fmt: skip


if __name__ == "__main__":
    assert gpu_timing.ROOT.is_dir()
    main()
