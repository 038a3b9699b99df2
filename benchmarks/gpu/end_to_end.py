"""``score_and_prune`` against the reference's loop, on UNets with random weights.

The reference scores with one batch of 128 and one noise, t = 0, 1, 2, ..., gradients summed in ``.grad``, and stops at
the first t with ``loss < 0.05 * max``. Random weights never get there, so some of its passes are timed and the rest is
counted: 1000 of them, and 490, where a trained model stops (measured on the digits model). Where 128 images don't fit,
the largest batch that does is timed and scaled to 128. Its own planning and slicing are left out; ours are included.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import gpu_timing
import numpy as np
import torch
import unet_configs
from torch import Tensor, nn

import diffprune_fast

TINY: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
SIZES = {"cifar": 32, "lsun": 256}
BATCH = 128
STEPS = 1000
TRAINED_STOPS_AT = 490


def unet(step: gpu_timing.Step, model: str) -> nn.Module:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    if step.rehearsal:
        return UNet2DModel(**TINY)
    with torch.device(step.device):
        return unet_configs.build(model)


def precision(step: gpu_timing.Step, name: str) -> AbstractContextManager[Any]:
    return torch.autocast(step.device.type, torch.bfloat16) if name == "bf16" else nullcontext()


class Images:
    """Random images in [-1, 1], the same at every iteration."""

    def __init__(self, size: int, batches: int, batch: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self._all = [torch.rand(batch, 3, size, size, generator=generator) * 2 - 1 for _ in range(batches)]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._all)


def reference_pass(
    step: gpu_timing.Step, model: nn.Module, size: int, batch: int, name: str
) -> tuple[Callable[[int], None], list[float]]:
    """A function that runs timestep t as the reference does, and the losses that it has seen."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler()
    images = torch.rand(batch, 3, size, size, device=step.device) * 2 - 1
    noise = torch.randn_like(images)
    losses: list[float] = []

    def run(t: int) -> None:
        timesteps = torch.full((batch,), t, device=step.device)
        with precision(step, name):
            predicted = model(scheduler.add_noise(images, noise, timesteps), timesteps).sample
            loss = torch.nn.functional.mse_loss(predicted.float(), noise)
        losses.append(loss.item())  # the reference compares every loss with the largest
        loss.backward()

    return run, losses


def time_reference(step: gpu_timing.Step, model_name: str, name: str) -> dict[str, Any]:
    """Seconds of one timestep of a batch of 128."""
    size = 8 if step.rehearsal else SIZES[model_name]
    batch, rounds = (4, 2) if step.rehearsal else (BATCH, 12 if model_name == "cifar" else 4)
    model = unet(step, model_name).to(step.device)
    while True:
        try:
            model.zero_grad(set_to_none=True)
            run, losses = reference_pass(step, model, size, batch, name)
            for t in range(2):
                run(t)
            step.synchronize()
            times = []
            for t in range(2, 2 + rounds):
                begin = time.perf_counter()
                run(t)
                step.synchronize()
                times.append(time.perf_counter() - begin)
            break
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        batch //= 2
        model.zero_grad(set_to_none=True)
        clean(step)
    scaled = float(np.median(times)) * BATCH / batch
    return {"batch": batch, "pass_s": scaled, "stopped": min(losses) < 0.05 * max(losses), "peak_gb": peak_gb(step)}


def time_ours(step: gpu_timing.Step, model_name: str, name: str) -> dict[str, Any]:
    """Seconds of the whole of ``score_and_prune``, the second time round: compilers and libraries are warm."""
    size = 8 if step.rehearsal else SIZES[model_name]
    micro_batch = 1 if step.rehearsal else 32
    options: dict[str, Any] = {"ratio": 0.3, "progress": False, "autocast": "bf16" if name == "bf16" else None}
    # what the first call may take is cut short: it is there to warm up
    warm_up, measured = ({"min_samples": 32, "max_samples": 64}, {})
    if step.rehearsal:
        warm_up = measured = {"min_samples": 16, "max_samples": 16}
    taken: list[float] = []
    while len(taken) < 2:
        model = unet(step, model_name).to(step.device)
        clean(step)
        begin = time.perf_counter()
        try:
            result = diffprune_fast.score_and_prune(
                model,
                Images(size, 16 if step.rehearsal else 8, micro_batch),
                micro_batch=micro_batch,
                **options,
                **(measured if taken else warm_up),
            )
        except torch.OutOfMemoryError:
            if micro_batch == 1:
                raise
            micro_batch //= 2
            continue
        step.synchronize()
        taken.append(time.perf_counter() - begin)
    assert result.scores is not None
    seconds = {f"{k}_s": v for k, v in result.seconds.items()}
    return {
        "seconds": taken[1],
        "first_call_s": taken[0],
        "samples": result.scores.samples,
        "micro_batch": micro_batch,
        "agreement": result.scores.agreement,
        "params_left": result.after.params / result.before.params,
        "peak_gb": peak_gb(step),
        **seconds,
    }


def clean(step: gpu_timing.Step) -> None:
    gc.collect()
    if step.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb(step: gpu_timing.Step) -> float | None:
    return torch.cuda.max_memory_allocated() / 1e9 if step.device.type == "cuda" else None


def main() -> None:
    step = gpu_timing.Step("end to end", __doc__.splitlines()[0])
    # what PyTorch does with float32 convolutions by default
    assert torch.backends.cudnn.allow_tf32 or step.rehearsal
    for model in ("cifar",) if step.rehearsal else ("cifar", "lsun"):
        for name in ("tf32", "bf16"):
            labels = {"operation": "score_and_prune", "model": model, "dtype": name}
            if not step.wants(model):
                continue
            ratios: dict[str, float] = {}
            ours: dict[str, Any] = {}
            clean(step)
            with step.attempt(**labels, provider="ours"):
                ours = time_ours(step, model, name)
                step.row(**labels, provider="ours, without the ratio", **ours)
            clean(step)
            with step.attempt(**labels, provider="reference loop, one pass"):
                reference = time_reference(step, model, name)
                step.row(**labels, provider="reference loop, one pass", **reference)
                passes = {"of_1000": STEPS, "of_490": TRAINED_STOPS_AT}
                if ours:
                    ratios = {f"ratio_{k}": reference["pass_s"] * n / ours["seconds"] for k, n in passes.items()}
                    step.row(**labels, provider="ours", **ours, **ratios)


if __name__ == "__main__":
    main()
