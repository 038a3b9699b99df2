"""Which timesteps matter, and how they are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..objective.batches import count
from ..objective.loss import Objective
from ..objective.randomness import DRAWN_BY_LOSS, seed_at, seed_globally
from ..objective.ranks import rank_and_count, summed_over_ranks
from .scores import LossCurve

CURVE_POINTS = 20


# 128 cells of 1,000 timesteps leave about 85 below a threshold crossed at t = 470; 91 timesteps gave a keep-set of
# Jaccard .995 to the full loop's, 62 gave .978 (digits, 2.5M parameters).
QUAD_CELLS = 128


@dataclass(frozen=True)
class Cell:
    """Timesteps ``start <= t < stop``, represented by one of them."""

    start: int
    stop: int

    @property
    def timestep(self) -> int:
        return (self.start + self.stop - 1) // 2

    @property
    def width(self) -> int:
        return self.stop - self.start


def quad_cells(n_timesteps: int, n_cells: int = QUAD_CELLS) -> list[Cell]:
    """All timesteps in cells whose width grows linearly: fine where the loss changes fast, 0 a cell of its own."""
    edges = n_timesteps * (np.arange(n_cells + 1) / n_cells) ** 2
    unique = np.unique(np.concatenate([[0, 1], np.floor(edges[1:] + 0.5).astype(np.int64)]))
    return [Cell(int(a), int(b)) for a, b in pairwise(unique) if b <= n_timesteps]


def curve_timesteps(n_timesteps: int, points: int = CURVE_POINTS) -> np.ndarray:
    """About ``points`` timesteps from 0 to the last, quadratically spaced: the loss is sharpest at 0."""
    spread = (n_timesteps - 1) * (np.arange(points) / (points - 1)) ** 2
    return np.unique(np.floor(spread + 0.5).astype(np.int64))


@torch.no_grad()
def measure_curve(
    objective: Objective,
    model: nn.Module,
    batch: Any,
    noise: Tensor,
    threshold: float,
    timesteps: np.ndarray,
    seed: int,
    *,
    shared: bool = True,
) -> LossCurve:
    """The mean loss of one batch with one noise at each of ``timesteps``, forward only.

    seed: of what the loss itself draws. shared: the ranks share the timesteps.

    Raises FloatingPointError, naming the timestep, for a NaN or infinite loss.
    """
    rank, ranks = rank_and_count() if shared else (0, 1)
    mine = torch.zeros(len(timesteps), dtype=noise.dtype, device=noise.device)
    for i in range(rank, len(timesteps), ranks):
        at = torch.full((count(batch),), int(timesteps[i]), device=noise.device)
        seed_globally(seed_at(seed, DRAWN_BY_LOSS, 2, i))
        mine[i] = objective.loss(model, batch, at, noise)
    losses = (
        (summed_over_ranks(mine) if shared else mine).double().cpu().numpy()
    )  # the host waits for the device here alone
    if not np.isfinite(losses).all():
        i = int(np.flatnonzero(~np.isfinite(losses))[0])
        raise FloatingPointError(f"the loss at timestep {timesteps[i]} is {losses[i]}")
    if losses.max() <= 0:
        raise ValueError("the loss is nowhere positive, so that no threshold can be drawn: pass timesteps=range(…)")
    return LossCurve(timesteps, losses, threshold)
