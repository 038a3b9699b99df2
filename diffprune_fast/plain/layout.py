"""The best config of a model's class under a budget: its widths are chosen by the damage that an allocation counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
from torch import nn

from ..architectures.configs import shapes_of
from ..architectures.knobs import Knobs, Values, knobs_of
from ..choices import NormGroups, Units
from ..plan.lattice import Lattice, lattice, rank_units
from ..plan.plan import Plan
from ..scoring.scores import Scores
from ..selection.allocation import Resource, coherent_curves, discounted
from ..selection.budgets import BudgetError, parse_budget
from ..selection.counting import levels_of_counts
from ..selection.ranking import normalised
from ..selection.select import Selection
from .conform import replaced_places
from .counts import counts_for
from .sinusoids import frequencies
from .target import target_of
from .wish import Like

Measure = Callable[[Values], float]


class Layout(Like):
    """A budget whose result has to be a config of the model's class."""

    def __init__(
        self, model: nn.Module, budget: Mapping[str, Any], steps: int, norm_groups: NormGroups, **options: Any
    ) -> None:
        self.model, self.steps, self.budget = model, steps, parse_budget(budget)
        if self.budget.kind not in ("ratio", "params", "macs"):
            raise ValueError(f"layout='config' goes with ratio, params or macs, not with {self.budget.kind}")
        round_to, most = options.pop("round_to", 8) or 1, options.pop("max_ratio", 0.9)
        self.knobs: Knobs = knobs_of(model, round_to, most)
        self.options = {"norm_groups": norm_groups, **options}

    def units(self, asked: Units) -> Units:
        return self.knobs.units if asked == "auto" else asked

    def select(self, plan: Plan, scores: Scores | np.ndarray) -> Selection:
        of = lattice(plan, self.options["norm_groups"], 1)
        levels = self._levels(plan, of)
        chosen, damaged = self._chosen(plan, of, levels, scores)
        updates = self.knobs.updates(chosen)
        self.target = target_of(self.model, {**updates, **frequencies(self.model, updates, self.steps)})
        found = super().select(plan, scores)
        cost = plan.complexity(found.keep)
        return replace(
            found,
            asked=f"{self.budget}, of a plain {type(self.model).__name__}",
            met=f"{self.target}: {cost}",
            ranking="global",
            allocation="gauss-newton" if damaged else "mean",
        )

    def _levels(self, plan: Plan, of: Lattice) -> Callable[[Values], np.ndarray]:
        """Kept levels per cluster as a function of the knobs, straight in each: two configs per knob tell it."""
        whole = tuple(values[0] for values in self.knobs.values)
        start = of.levels.astype(float)
        slopes = []
        for k, values in enumerate(self.knobs.values):
            some = next((v for v in values[1:] if self._allowed((*whole[:k], v, *whole[k + 1 :]))), None)
            if some is None:
                slopes.append(np.zeros(len(start)))
                continue
            target = target_of(self.model, self.knobs.updates((*whole[:k], some, *whole[k + 1 :])))
            counts = counts_for(plan, shapes_of(target.fresh), replaced_places(self.model, target))
            slopes.append((levels_of_counts(plan, of, counts) - start) / (some - whole[k]))
        slope = np.array(slopes)
        return lambda chosen: start + (np.array(chosen, float) - whole) @ slope

    def _allowed(self, chosen: Values) -> bool:
        return all(chosen[a] != chosen[b] for a, b in self.knobs.apart)

    def _chosen(
        self, plan: Plan, of: Lattice, levels: Callable[[Values], np.ndarray], scores: Scores | np.ndarray
    ) -> tuple[Values, bool]:
        values = scores if isinstance(scores, np.ndarray) else scores.values
        damage = None if isinstance(scores, np.ndarray) else scores.damage
        by = normalised(plan, values) ** 2 if damage is None else damage
        if damage is not None and self.budget.kind == "params":
            by = discounted(plan, of, damage)
        curves = coherent_curves(rank_units(of, values, self.options.get("offsets", "independent")), by)
        resource = Resource.of(plan, of, self.budget.kind)
        whole = resource.at(of.levels)
        limit = (1 - self.budget.value) * whole if self.budget.kind == "ratio" else self.budget.limit(round(whole))

        def loss(chosen: Values) -> float:
            at = levels(chosen)
            near = np.rint(at).astype(int)
            if not self._allowed(chosen) or (abs(at - near) > 1e-6).any() or (near < 1).any():
                return float("inf")
            if not all(n in allowed for n, allowed in zip(near.tolist(), of.allowed)):
                return float("inf")
            return float(sum(curve[n] for curve, n in zip(curves, near.tolist())))

        found = cheapest(self.knobs.values, loss, lambda chosen: resource.at(levels(chosen)), limit)
        if found is None:
            least = min(resource.at(levels(c)) for c in _corners(self.knobs.values) if loss(c) < float("inf"))
            raise BudgetError(
                f"{self.budget} can't be met by a config of {type(self.model).__name__}: with max_ratio and round_to "
                f"one gets down to {least / whole:.3f}"
            )
        return found, damage is not None


def _corners(values: tuple[Values, ...]) -> Iterator[Values]:
    yield tuple(v[0] for v in values)
    yield from product(*(v[-3:] for v in values))


def cheapest(values: tuple[Values, ...], loss: Measure, cost: Measure, limit: float) -> Values | None:
    """The values that cost at most ``limit`` and lose little; None where none do.

    Greedy from the full widths, looking ahead over every lower value of every knob: what loses least for what it saves.
    Then, as long as that loses less, one knob goes up and, if need be, another one down.
    """
    loss, cost = lru_cache(None)(loss), lru_cache(None)(cost)
    infinite = float("inf")
    now = tuple(v[0] for v in values)
    while cost(now) > limit:
        lower = [c for c in _turned(values, now) if cost(c) < cost(now) and loss(c) < infinite]
        lower = lower or [c for c in _turned_twice(values, now) if cost(c) < cost(now) and loss(c) < infinite]
        if not lower:
            return None
        now = min(lower, key=lambda c: ((loss(c) - loss(now)) / (cost(now) - cost(c)), cost(c)))
    while True:
        better = [c for c in _turned_twice(values, now) if cost(c) <= limit and loss(c) < loss(now)]
        if not better:
            return now
        now = min(better, key=loss)


def _turned(values: tuple[Values, ...], now: Values) -> Iterator[Values]:
    for k, some in enumerate(values):
        for v in some:
            if v != now[k]:
                yield (*now[:k], v, *now[k + 1 :])


def _turned_twice(values: tuple[Values, ...], now: Values) -> Iterator[Values]:
    for once in _turned(values, now):
        yield once
        yield from (twice for twice in _turned(values, once) if twice != now)
