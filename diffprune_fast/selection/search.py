"""Finding the kept counts that meet a budget from below, as closely as the lattice allows."""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np

from ..plan.lattice import Lattice

Cost = Callable[[np.ndarray], float]


class Unreachable(Exception):
    """The budget lies below everything that may be chosen; ``least`` is the least cost."""

    def __init__(self, least: float) -> None:
        super().__init__(least)
        self.least = least


def nearest(allowed: np.ndarray, wanted: np.ndarray | float) -> np.ndarray:
    """The allowed number nearest to what is wanted; halfway, the larger one."""
    above = np.clip(np.searchsorted(allowed, wanted), 0, len(allowed) - 1)
    below = np.maximum(above - 1, 0)
    return np.where(allowed[above] - wanted <= wanted - allowed[below], allowed[above], allowed[below])


def meet(lattice: Lattice, choices: list[np.ndarray], level_scores: np.ndarray, cost: Cost, limit: float) -> np.ndarray:
    """Choose a kept number of levels per cluster so that ``cost(counts) <= limit``.

    choices: per cluster the sorted numbers of levels that may stay. level_scores: see ``Ranking.level_scores``; the
    levels below one threshold go, in all clusters alike. cost: of kept units per group; never falls when a count rises.

    A bisection finds the highest threshold that is low enough; then the best of what went comes back, a step at a
    time, as long as the limit holds.

    Raises Unreachable where even the smallest choices cost more than ``limit``.
    """
    first = np.concatenate([[0], np.cumsum(lattice.levels)])
    owner = np.repeat(np.arange(len(lattice.levels)), lattice.levels)
    free = np.array([len(c) > 1 for c in choices], bool)
    order = np.argsort(level_scores, kind="stable")
    order = order[free[owner[order]]]
    snap = np.concatenate(
        [nearest(c, np.arange(q + 1)) for c, q in zip(choices, lattice.levels.tolist(), strict=True)]
        or [np.zeros(0, np.int64)]
    )
    snap_first = first[:-1] + np.arange(len(choices))

    def choose(gone: int) -> np.ndarray:
        removed = np.bincount(owner[order[:gone]], minlength=len(choices))
        return snap[snap_first + lattice.levels - removed]

    least = np.array([c[0] for c in choices], np.int64)
    if cost(lattice.counts(least)) > limit:
        raise Unreachable(cost(lattice.counts(least)))
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if cost(lattice.counts(choose(middle))) <= limit:
            high = middle
        else:
            low = middle + 1
    chosen = choose(high)
    return _give_back(lattice, choices, level_scores, cost, limit, chosen)


def _give_back(
    lattice: Lattice,
    choices: list[np.ndarray],
    level_scores: np.ndarray,
    cost: Cost,
    limit: float,
    chosen: np.ndarray,
) -> np.ndarray:
    """Raise single clusters while the limit holds, the highest scores first.

    What a step costs only grows with everything else that stays, so a step that is refused once stays refused.
    """
    first = np.concatenate([[0], np.cumsum(lattice.levels)])
    sums = np.concatenate([[0.0], np.cumsum(level_scores)])
    chosen = chosen.copy()
    waiting: list[tuple[float, int, int]] = []

    def offer(c: int) -> None:
        at = int(np.searchsorted(choices[c], chosen[c], side="right"))
        if at < len(choices[c]):
            step = int(choices[c][at])
            top = first[c] + lattice.levels[c]
            gain = (sums[top - chosen[c]] - sums[top - step]) / (step - chosen[c])
            heapq.heappush(waiting, (-gain, c, step))

    for c in range(len(choices)):
        offer(c)
    while waiting:
        _, c, step = heapq.heappop(waiting)
        before = chosen[c]
        chosen[c] = step
        if cost(lattice.counts(chosen)) <= limit:
            offer(c)
        else:
            chosen[c] = before
    return chosen
