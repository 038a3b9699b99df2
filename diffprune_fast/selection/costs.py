"""What a budget counts beside parameters, MACs and units: any function of the kept counts, from here or elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol

import numpy as np

from ..plan.lattice import Lattice
from ..plan.plan import Plan

# Where other packages name budgets of theirs, functions ``plan -> Cost``, and allocations, see :class:`Allocator`.
BUDGET_POINTS = "diffprune_fast.budgets"
ALLOCATION_POINTS = "diffprune_fast.allocations"


class Cost(Protocol):
    """What a model costs with kept counts per group, ``(n_groups,)``; of ``(n, n_groups)``, ``(n,)`` of them.

    It may have ``words(value) -> str``, how a value is written; ``limits() -> str``, what keeps it from falling
    further; ``in_levels(lattice)``, with a method ``change(chosen, cluster, level) -> (n,)``: how much more it costs
    when, each alone, ``cluster[i]`` keeps ``level[i]`` levels in place of ``chosen``, ``(n_clusters,)``.
    """

    def __call__(self, counts: np.ndarray) -> Any: ...


class Allocator(Protocol):
    """How groups share a budget: kept levels per cluster, ``(n_clusters,)``, that cost at most ``limit``.

    choices: per cluster the sorted levels that may stay. curves: per cluster what the output loses when it keeps
    ``j`` of its levels, ``(levels + 1,)``. cost: of kept levels per cluster.
    """

    def __call__(
        self,
        choices: Sequence[np.ndarray],
        curves: Sequence[np.ndarray],
        cost: Callable[[np.ndarray], float],
        limit: float,
    ) -> np.ndarray: ...


class CostOfLevels:
    """A cost in terms of kept levels, as :func:`~.allocation.allocate` asks for it (see ``allocation.Resource``)."""

    def __init__(self, cost: Cost, lattice: Lattice) -> None:
        self.cost, self.lattice = cost, lattice
        n = len(lattice.levels)
        self.second = np.zeros((n, n))
        made = getattr(cost, "in_levels", None)
        self._quick: Any = None if made is None else made(lattice)

    def at(self, chosen: np.ndarray) -> float:
        return float(self.cost(self.lattice.counts(chosen)))

    def slope(self, chosen: np.ndarray) -> np.ndarray:
        return np.zeros(len(chosen))

    def change(self, chosen: np.ndarray, slope: np.ndarray, cluster: np.ndarray, step: np.ndarray) -> np.ndarray:
        level = chosen[cluster] + step
        if self._quick is not None:
            return np.asarray(self._quick.change(chosen, cluster, level))
        then = np.repeat(chosen[None], len(cluster), axis=0)
        then[np.arange(len(cluster)), cluster] = level
        return np.asarray(self.cost(self.lattice.counts(then))) - self.at(chosen)


def words_of(cost: Cost, value: float) -> str:
    words = getattr(cost, "words", None)
    return f"{value:.4g}" if words is None else str(words(value))


def costs_for(plan: Plan, kinds: Sequence[str], given: Mapping[str, Cost]) -> dict[str, Cost]:
    """A cost for each kind of budget: what is given, or what a package that is installed makes of the plan.

    Raises ValueError for a kind that nobody counts.
    """
    found: dict[str, Cost] = {}
    for kind in kinds:
        point = None if kind in given else points(BUDGET_POINTS).get(kind)
        if kind in given:
            found[kind] = given[kind]
        elif point is not None:
            found[kind] = point.load()(plan)
        else:
            raise ValueError(
                f"{kind}= is counted by nothing here: give costs={{{kind!r}: ...}}, a function of kept counts"
                + {"latency": " (measure_times)", "memory": " (count_memory)"}.get(kind, "")
            )
    return found


def points(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}


def allocated_by(
    name: str, choices: Sequence[np.ndarray], curves: Sequence[np.ndarray], cost: Callable[[np.ndarray], float],
    limit: float,
) -> np.ndarray:  # fmt: skip
    """What a package's allocation chooses. Raises ValueError where that isn't allowed."""
    chosen = np.asarray(points(ALLOCATION_POINTS)[name].load()(choices, curves, cost, limit))
    if chosen.shape != (len(choices),) or not all(level in some for level, some in zip(chosen.tolist(), choices)):
        raise ValueError(f"allocation {name!r} chose levels that aren't among the choices")
    if cost(chosen) > limit:
        raise ValueError(f"allocation {name!r} chose what costs {cost(chosen):.6g}, more than the limit {limit:.6g}")
    return chosen.astype(np.int64)
