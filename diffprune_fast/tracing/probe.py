"""Widths that a forward reads from elsewhere: found by slicing a model on meta before anything is planned on it.

Labels show which channels go together, not where a forward takes a size from: ``h.view(b, -1, self.inner_dim)``, or
``text.view(b, -1, image.shape[-1])``. So a first plan is tried with uneven keep-sets. Where the walk fails, two groups
whose sizes the failing operation confuses are tied to equal counts; otherwise the group stays whole, with the reason.
"""

from __future__ import annotations

import numpy as np
from torch import nn

from .gate import GateError, pass_gate, sliced_shapes, units_of_nodes
from .grouping import build_plan
from .plan import Plan
from .walk import Calls, Walk

# Every round settles at least one group; a model with more hidden couplings than this is left to the gate.
ROUNDS = 24


def probed(model: nn.Module, walk: Walk, plan: Plan, calls: Calls) -> Plan:
    """The plan, with groups tied or frozen until uneven keep-sets of it pass the gate."""
    for turn in range(ROUNDS):
        keep = _uneven(plan, seed=turn)
        try:
            pass_gate(model, plan, sliced_shapes(model, plan, keep), "count", calls)
        except GateError as error:
            if not _settle(walk, plan, keep, error):
                return plan
            plan = build_plan(model, walk)
        else:
            return plan
    return plan


def _uneven(plan: Plan, seed: int) -> dict[str, np.ndarray]:
    """An allowed keep-set in which groups of equal size keep different counts, as far as that goes."""
    from ..selection.constraints import lattice  # selection is planned on: it imports this package
    from ..selection.ranking import rank_units

    of = lattice(plan, "count")
    random = np.random.default_rng(seed)
    chosen = np.array([c[random.integers(max(1, len(c) // 2), len(c)) - 1] if len(c) > 1 else c[0] for c in of.allowed])
    stays = rank_units(of, random.random(plan.n_units), "independent").kept(chosen.astype(np.int64))
    return {g.name: np.flatnonzero(stays[plan.offsets[i] : plan.offsets[i + 1]]) for i, g in enumerate(plan.groups)}


def _settle(walk: Walk, plan: Plan, keep: dict[str, np.ndarray], error: GateError) -> bool:
    """Tie or freeze the groups that a failure concerns; False where it concerns none."""
    unit_of = units_of_nodes(plan, walk.nodes)
    units = unit_of[error.nodes]
    groups = np.unique(np.searchsorted(plan.offsets, units[units >= 0], side="right") - 1).tolist()
    reason = f"has a width that is read elsewhere ({str(error).partition('. Its forward')[0]})"
    asked = [g for g, group in enumerate(plan.groups) if 2 < len(keep[group.name]) in error.sizes]
    for g in groups:
        twins = [t for t in asked if plan.groups[t].n_units == plan.groups[g].n_units and t != g]
        twins = [t for t in twins if len(keep[plan.groups[t].name]) != len(keep[plan.groups[g].name])]
        if len(twins) == 1:
            rows = np.stack([_first_nodes(walk, plan, g), _first_nodes(walk, plan, twins[0])])
            walk.graph.constrain("size", reason, rows)
            return True
    for g in groups or asked:
        walk.graph.freeze(_first_nodes(walk, plan, g), reason)
    return bool(groups or asked)


def _first_nodes(walk: Walk, plan: Plan, g: int) -> np.ndarray:
    """One channel of every unit of a group, ``(n_units,)``."""
    member = plan.groups[g].members[0]
    return walk.nodes.start[member.parameter, member.dim] + member.index[:, 0].astype(np.int32)
