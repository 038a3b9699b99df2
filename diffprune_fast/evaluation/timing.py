"""Seconds per image, as somebody who samples from the model sees them."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from .sampling import sample


def seconds_per_image(
    model: nn.Module, scheduler: Any, noise: Tensor, *, steps: int = 50, repeats: int = 5, **conditioning: Any
) -> float:
    """Median wall-clock seconds of one image, sampled in batches of ``len(noise)`` with ``steps`` model calls each.

    noise: ``(n, channels, height, width)``. The first, untimed call has few steps and warms up. Raises ValueError when
    ``repeats`` is below 1. The figure belongs to the machine and its load: quote ratios of models timed in turn.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}: it must be at least 1")
    sample(model, scheduler, noise, steps=min(steps, 3), batch_size=len(noise), **conditioning)
    seconds = []
    for _ in range(repeats):
        start = _now(noise.device)
        sample(model, scheduler, noise, steps=steps, batch_size=len(noise), **conditioning)
        seconds.append(_now(noise.device) - start)
    return statistics.median(seconds) / len(noise)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
