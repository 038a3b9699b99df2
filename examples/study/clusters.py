"""What single clusters of channels cost when a third of them goes, beside what the scores say of it."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from methods import Pruner

from diffprune_fast.plan.lattice import Lattice, lattice, rank_units
from diffprune_fast.selection.search import nearest

SHARE = 1 / 3
SCORED_BY = ("random", "magnitude", "taylor", "micro")


def damage_rows(pruner: Pruner, results: Any) -> None:
    """One line for every cluster: groups that constraints tie to one another, which lose the same share.

    In it micro's lowest third goes. "damage": the mean squared change of the output, "compensated": the same after
    compensation, "scores": every score's forecast.
    """
    bench, plan = pruner.bench, pruner.plan
    of = lattice(plan, "count")
    able = [c for c, choices in enumerate(of.allowed) if len(choices) > 1][: bench.amounts.clusters]
    rows = {c: {"model": bench.subject.name, "measure": "damage", "cluster": _groups(pruner, of, c)} for c in able}
    if all(results.has(row) for row in rows.values()):
        return
    order = rank_units(of, pruner.scores("micro", 0).values, "independent")
    for c, row in rows.items():
        if results.has(row):
            continue
        started = time.perf_counter()
        chosen = of.levels.copy()
        chosen[c] = nearest(of.allowed[c][:-1], (1 - SHARE) * of.levels[c])
        kept = order.kept(chosen)
        bounds = zip(plan.groups, plan.offsets[:-1], plan.offsets[1:])
        sliced = pruner.sliced({g.name: np.flatnonzero(kept[start:stop]) for g, start, stop in bounds})
        found = {"gone": int((~kept).sum()), "damage": bench.damage(sliced.model)}
        found["compensated"] = bench.damage(pruner.compensated(sliced, 0))
        found["scores"] = forecasts(pruner, ~kept)
        results.add({**row, **found, "seconds": round(time.perf_counter() - started, 1)})


def forecasts(pruner: Pruner, gone: np.ndarray) -> dict[str, float]:
    """What each score says that the loss of these units costs.

    Sums as they are, sums of scores divided by their group's mean, and Gauss-Newton's two: the sum, and the square of
    the sum of roots (errors of one group's channels add in amplitude).
    """
    sizes = np.diff(pruner.plan.offsets)
    group_of = np.repeat(np.arange(len(sizes)), sizes)
    found = {}
    for criterion in SCORED_BY:
        values = pruner.scores(criterion, 0).values
        mean = np.bincount(group_of, weights=values) / sizes
        found[criterion] = float(values[gone].sum())
        found[f"{criterion} / group mean"] = float((values / np.maximum(mean[group_of], 1e-300))[gone].sum())
    damage = getattr(pruner.scores("micro", 0), "damage", None)
    if damage is not None:
        found["gauss-newton, additive"] = float(damage[gone].sum())
        found["gauss-newton, coherent"] = float(np.sqrt(damage[gone]).sum() ** 2)
    return found


def _groups(pruner: Pruner, of: Lattice, c: int) -> str:
    return " ".join(g.name for g, cluster in zip(pruner.plan.groups, of.cluster) if cluster == c)
