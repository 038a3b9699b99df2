"""Budgets of time and memory: counted before anything is selected, measured on what was selected, and selected anew
where the two differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from .footprint.memory import count_memory
from .footprint.promise import Promise
from .footprint.times import Times, measure_times
from .objective.ranks import of_first_rank, rank_and_count
from .plan.lattice import Lattice
from .plan.plan import Plan
from .selection.budgets import Budget, BudgetError, parse_budgets
from .selection.costs import Cost, CostOfLevels, words_of
from .selection.select import Selection, select
from .slicing.prune import prune

# How far what is measured may be above and below what was asked, how often it is selected anew, and how
# often it is measured where it is off.
ABOVE, BELOW, ROUNDS, MEASURED = 0.02, 0.04, 3, 3
# A prediction is bent by no more than this factor: beyond, the machine was busy with something else.
MOST = 1.5

Costs = Mapping[str, Cost]
Choose = Callable[[Costs], Selection]


def measurable(asked: Mapping[str, float | None]) -> tuple[Budget, ...]:
    """The budgets, of those that were asked, that are measured on the device."""
    budgets = parse_budgets({name: asked.get(name) for name in ("latency", "memory")})
    return tuple(budget for budget in budgets if budget.kind in ("latency", "memory"))


def costs_of(
    model: nn.Module,
    plan: Plan,
    budgets: Sequence[Budget],
    given: Costs,
    round_to: int | None,
    **slicing: Any,
) -> dict[str, Cost]:
    """What the budgets count: what is given, or what is measured now.

    slicing: options of :func:`prune`, ``example_inputs`` among them.

    Raises ValueError for a time that several processes would each measure.
    """
    costs, inputs = dict(given), slicing.get("example_inputs")
    for kind in {budget.kind for budget in budgets} - set(given):
        if kind == "memory":
            costs[kind] = count_memory(model, plan, inputs)
        elif rank_and_count()[1] > 1:
            raise ValueError("latency= is measured by one process: several would each find other widths. Prune in one")
        else:
            times = measure_times(model, plan, inputs, round_to=round_to)
            costs[kind] = _calibrated(times, model, plan, round_to, slicing)
    return costs


def _calibrated(times: Times, model: nn.Module, plan: Plan, round_to: int | None, slicing: dict[str, Any]) -> Times:
    """Times that agree with a copy of half the width: timed in turn with the dense model, their ratio is steadier on a
    busy machine than what the dense model takes beside its operations, each timed at its own moment."""
    values = np.random.default_rng(0).random(plan.n_units)
    try:
        norm_groups = slicing.get("norm_groups", "count")
        keep = select(plan, values, ratio=0.5, round_to=round_to, norm_groups=norm_groups).keep
    except BudgetError:
        return times
    thin = prune(model, plan, keep, inplace=False, **{**slicing, "proof": False}).model
    before, after = times.measured([model, thin])
    return times.through(plan.counts(keep), after / before)


def keep_promises(
    dense: nn.Module,
    plan: Plan,
    budgets: Sequence[Budget],
    costs: Costs,
    choose: Choose,
    **slicing: Any,
) -> tuple[Selection, tuple[Promise, ...]]:
    """A selection whose model takes what was asked, as measured on a sliced copy.

    Where the measured share is off, the cost is bent so that it would have said it, and selected anew: at most three
    times. slicing: options of :func:`prune`.

    Raises BudgetError where what was measured puts a budget out of reach.
    """
    bent, found = dict(costs), []
    for _ in range(ROUNDS):
        selection = choose(bent)
        trial = prune(dense, plan, selection.keep, inplace=False, **{**slicing, "proof": False}).model
        counts = plan.counts(selection.keep)
        promises = tuple([promise(plan, b, costs[b.kind], bent[b.kind], counts, (dense, trial)) for b in budgets])
        found.append((selection, promises))
        if all(_excess(p) <= ABOVE for p in promises) and any(_excess(p) >= -BELOW for p in promises):
            break
        bent |= {p.kind: _bent(plan, costs[p.kind], counts, p.measured) for p in promises}
    return min(found, key=lambda one: _distance(one[1]))


def promise(
    plan: Plan,
    budget: Budget,
    cost: Cost,
    bent: Cost,
    counts: np.ndarray,
    models: tuple[nn.Module, nn.Module],
) -> Promise:
    """What was asked, what the cost as it is now predicts for these counts, and what the sliced model takes."""
    whole = float(cost(plan.counts()))
    measure = getattr(cost, "measured", None)
    measured = None
    if measure is not None:
        asked = budget.limit(whole) / whole
        shares: list[float] = []
        while not shares or (len(shares) < MEASURED and abs(shares[0] / asked - 1) > ABOVE):  # it may be chance
            before, after = of_first_rank(torch.tensor(measure(models), dtype=torch.float64)).tolist()
            shares.append(after / before)
        measured, told = float(np.median(shares)), words_of(cost, before)
    else:
        told = words_of(cost, whole)
    where = getattr(cost, "device", None)
    dense = told + (f" ({where})" if where else "")
    return Promise(budget.kind, budget.limit(whole) / whole, float(bent(counts)) / whole, measured, dense)


def _excess(found: Promise) -> float:
    """How far what was measured is above what was asked, as a share of that; below it is less than 0."""
    return 0.0 if found.measured is None else found.measured / found.asked - 1


def _distance(found: Sequence[Promise]) -> float:
    """How far a round was from what was asked; above it counts three times what it does below."""
    excess = max((_excess(p) for p in found), default=0.0)
    return 3 * excess if excess > 0 else -excess


class _Bent:
    """A cost whose savings are all multiplied, so that it agrees with what was measured once."""

    def __init__(self, cost: Cost, whole: float, factor: float) -> None:
        self.cost, self.whole, self.factor = cost, whole, factor

    def __call__(self, counts: np.ndarray) -> Any:
        return self.whole - (self.whole - self.cost(counts)) * self.factor

    def in_levels(self, lattice: Lattice) -> Any:
        return _BentLevels(CostOfLevels(self.cost, lattice), self.factor)

    def words(self, value: float) -> str:
        return words_of(self.cost, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cost, name)


class _BentLevels:
    def __init__(self, cost: CostOfLevels, factor: float) -> None:
        self.cost, self.factor = cost, factor

    def change(self, chosen: np.ndarray, cluster: np.ndarray, level: np.ndarray) -> np.ndarray:
        return self.factor * self.cost.change(chosen, np.zeros(0), cluster, level - chosen[cluster])


def _bent(plan: Plan, cost: Cost, counts: np.ndarray, measured: float | None) -> Cost:
    whole = float(cost(plan.counts()))
    saved = 1 - float(cost(counts)) / whole
    if measured is None or saved <= 0 or measured >= 1:
        return cost
    return _Bent(cost, whole, min(max((1 - measured) / saved, 1 / MOST), MOST))
