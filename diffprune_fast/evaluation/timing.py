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

    The first, untimed call has few steps and warms up. The figure belongs to the machine and its load: quote ratios of
    models timed in turn.

    Args:
        model, scheduler, steps, conditioning: as for :func:`sample`.
        noise: ``(n, channels, height, width)``, on the model's device.
        repeats: timed calls, of which the median is taken.

    Returns:
        Seconds.

    Raises:
        ValueError: ``repeats`` is below 1, or what :func:`sample` raises it for.

    Example:
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> unet = UNet2DModel(8, block_out_channels=(8,), down_block_types=("DownBlock2D",),
        ...                    up_block_types=("UpBlock2D",), norm_num_groups=4)
        >>> seconds_per_image(unet, DDPMScheduler(), torch.randn(2, 3, 8, 8), steps=2, repeats=1) > 0
        True
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
