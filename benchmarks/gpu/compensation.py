"""Compensation of a UNet of Stable Diffusion 1.5's size with random weights: seconds and bytes of every stage.

Half the MACs by magnitude, then the layers that lost inputs are solved from 64 calls of the model (96, of which a third
is held back). Random weights say nothing of the quality; the arithmetic is that of trained ones.
"""

from __future__ import annotations

import copy
import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gpu_timing
import torch
from end_to_end import TINY, clean
from gpu_timing import Step
from torch import nn

import diffprune_fast
from diffprune_fast.compensation import compensate
from diffprune_fast.plan.keep_sets import sliced_shapes

# The function of the same name hides the module.
stages = importlib.import_module("diffprune_fast.compensation.compensate")
SAMPLES = 96
LABELS = {"operation": "compensation", "model": "sd15", "dtype": "bf16"}


def model_and_calls(step: Step) -> tuple[nn.Module, list[dict[str, Any]]]:
    torch.manual_seed(0)
    if step.rehearsal:
        from diffusers import UNet2DModel

        return UNet2DModel(**TINY), [{"sample": torch.randn(6, 3, 8, 8), "timestep": torch.randint(0, 1000, (6,))}]
    import unet_configs

    with torch.device(step.device):
        model = unet_configs.build("sd15")
    calls = []
    for _ in range(SAMPLES // 16):
        call = {"sample": torch.randn(16, 4, 64, 64), "timestep": torch.randint(0, 1000, (16,))}
        calls.append(call | {"encoder_hidden_states": torch.randn(16, 77, 768)})
    return model, calls


@contextmanager
def stage(step: Step, name: str, memory: bool = True) -> Iterator[None]:
    """A row with the seconds of what happens inside, and the most memory that it took on top of what was there.

    memory: not where other stages are inside, which begin to count anew.
    """
    step.synchronize()
    cuda = memory and step.device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    yield
    step.synchronize()
    seconds = time.perf_counter() - begin
    extra = (torch.cuda.max_memory_allocated() - before) / 1e6 if cuda else None
    step.row(**LABELS, provider=name, seconds=seconds, extra_mb=extra)


@contextmanager
def watched(step: Step) -> Iterator[None]:
    """The stages inside ``compensate``, each with a row of its own."""
    places: list[tuple[Any, str, str]] = [(stages, "measured", "operations and memory of the layers")]
    places += [(stages, "record", "dense outputs recorded"), (stages.Solver, "run", "layers solved in order")]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]

    def timed(call: Callable[..., Any], words: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with stage(step, words):
                return call(*args, **kwargs)

        return run

    for (owner, name, words), (_, _, call) in zip(places, before):
        setattr(owner, name, timed(call, words))
    try:
        yield
    finally:
        for owner, name, call in before:
            setattr(owner, name, call)


def main() -> None:
    step = Step("compensation", __doc__.splitlines()[0])
    dense, calls = model_and_calls(step)
    with step.attempt(**LABELS):
        with stage(step, "traced"):
            plan = diffprune_fast.trace(dense)
        scores = diffprune_fast.score(dense, None, plan, criterion="magnitude")
        with stage(step, "selected"):
            selection = diffprune_fast.select(plan, scores, macs=0.5)
        pruned = copy.deepcopy(dense)
        with stage(step, "sliced, with its verification"):
            result = diffprune_fast.prune(pruned, plan, selection.keep)
        clean(step)
        kept = sliced_shapes(dense, plan, selection.keep).kept
        for mode in ("auto",) if step.rehearsal else ("channels", "full"):
            found = None
            with (
                step.attempt(**LABELS, provider=mode),
                watched(step),
                stage(step, f"all of it, mode {mode}", memory=False),
            ):
                # every mode begins with the sliced weights
                found = compensate(
                    copy.deepcopy(result.model), dense, kept=kept, calibration=calls, mode=mode,
                    autocast=None if step.rehearsal else "bf16", progress=False,
                )  # fmt: skip
            if found is not None:
                step.row(
                    **LABELS, provider=f"outcome, mode {found.mode}", seconds=found.seconds, samples=found.samples,
                    layers=len(found.layers), estimated_mb=found.bytes / 1e6, ratio=found.sliced / found.compensated,
                )  # fmt: skip


if __name__ == "__main__":
    assert gpu_timing.ROOT.is_dir()
    main()
