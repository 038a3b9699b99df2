"""Keep-sets of counts that are given: the best units of every group, so many of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..choices import NormGroups, Offsets
from ..plan.lattice import Lattice, lattice, rank_units
from ..plan.plan import Plan
from .budgets import BudgetError


def levels_of_counts(plan: Plan, of: Lattice, counts: Mapping[str, int]) -> np.ndarray:
    """Kept levels per cluster, ``(n_clusters,)``, at which every group keeps what ``counts`` says.

    Raises BudgetError for a count that constraints don't allow; ValueError for a name that is no group.
    """
    for name in counts:
        if name not in plan.position:
            raise ValueError(f"counts name {name!r}, which is no group of the plan of {plan.model_class}")
    chosen = of.levels.copy()
    said = np.full(len(chosen), -1)
    for g, group in enumerate(plan.groups):
        c = int(of.cluster[g])
        levels, count = int(of.levels[c]), int(counts.get(group.name, group.n_units))
        level = count * levels // group.n_units
        fits = level * group.n_units == count * levels and level in of.allowed[c]
        if not fits:
            widths = of.allowed[c] * group.n_units // levels
            kinds = sorted({x.kind for x in plan.constraints if (plan.group_of[x.rows[x.rows >= 0]] == g).any()})
            raise BudgetError(
                f"{group.name} can't keep {count} of {group.n_units} units: {', '.join(kinds) or 'the least width'} "
                f"leave {', '.join(map(str, widths[:4]))}{', ...' if len(widths) > 4 else ''}"
            )
        if said[c] >= 0 and chosen[c] != level:
            other = plan.groups[int(said[c])].name
            raise BudgetError(f"{group.name} can't keep {count} of {group.n_units} units: it shrinks with {other}")
        chosen[c], said[c] = level, g
    return chosen


def keep_of_counts(
    plan: Plan, values: np.ndarray, counts: Mapping[str, int], norm_groups: NormGroups, offsets: Offsets
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The units with the highest scores, so many of every group as ``counts`` says; and the counts of all groups."""
    allowed = lattice(plan, norm_groups, 1)
    chosen = levels_of_counts(plan, allowed, counts)
    order = rank_units(allowed, values, offsets)
    return plan.keep_of(order.kept(chosen)), allowed.counts(chosen)
