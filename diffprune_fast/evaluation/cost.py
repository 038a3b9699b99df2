"""Seconds and memory of one forward, at several batch sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..objective.batches import count, part, repeated
from ..objective.isolation import in_mode
from ..objective.loss import LossFunction, make_objective
from ..objective.nested import moved
from ..objective.randomness import generator_for

WARM_UP = 2


@dataclass(frozen=True)
class Forward:
    """seconds: the median of one forward. peak_bytes: the most memory that the device held, None where it doesn't
    count (the CPU)."""

    batch_size: int
    seconds: float
    peak_bytes: int | None


@torch.no_grad()
def forward_costs(
    model: nn.Module,
    batch: Any,
    scheduler: Any = None,
    *,
    batch_sizes: Sequence[int] = (1, 8),
    repeats: int = 5,
    loss_fn: LossFunction | None = None,
) -> list[Forward]:
    """What a forward of ``model`` takes, at each batch size: after two untimed ones, the median of ``repeats``.

    Seconds belong to the machine and its load; of two models measured in turn, quote the ratio.

    Args:
        model: a denoiser or an autoencoder.
        batch: what a loader would yield; repeated or cut to each batch size.
        scheduler: the one of the training; None is ``DDPMScheduler()``.
        batch_sizes: at which it is measured.
        repeats: timed forwards.
        loss_fn: ``(model, batch, t, noise) -> loss`` in place of the scheduler's objective.

    Returns:
        One entry for each batch size.

    Raises:
        ValueError: a batch size or ``repeats`` is below 1.

    Example:
        >>> from diffusers import UNet2DModel
        >>> unet = UNet2DModel(8, block_out_channels=(8,), down_block_types=("DownBlock2D",),
        ...                    up_block_types=("UpBlock2D",), norm_num_groups=4)
        >>> [cost.batch_size for cost in forward_costs(unet, torch.zeros(4, 3, 8, 8), repeats=1)]
        [1, 8]
    """
    if min(repeats, *batch_sizes) < 1:
        raise ValueError(f"batch sizes {tuple(batch_sizes)} and {repeats} repeats: all must be at least 1")
    objective, device = make_objective(model, scheduler, loss_fn), next(model.parameters()).device
    found = []
    with in_mode(model, training=False):
        for size in batch_sizes:
            given = moved(part(repeated(batch, -(-size // count(batch))), 0, size), device)
            noise = objective.noise(given, generator_for(0)).to(device)
            seconds = []
            for i in range(WARM_UP + repeats):
                if i == WARM_UP and device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                start = _now(device)
                objective.loss(model, given, objective.n_timesteps // 2, noise)
                seconds.append(_now(device) - start)
            peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
            found.append(Forward(size, statistics.median(seconds[WARM_UP:]), peak))
    return found


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
