"""How many units of each group a target means: read from the shapes of its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Set

import numpy as np

from ..plan.plan import Plan
from ..selection.budgets import BudgetError

Shapes = Mapping[str, tuple[int, ...]]
Place = tuple[str, int]


def counts_for(plan: Plan, wanted: Shapes, replaced: Set[Place] = frozenset()) -> dict[str, int]:
    """Kept units of every group, by name, that give all parameters the sizes ``wanted``.

    replaced: places whose size is not a matter of channels that stay, and is seen to by others.

    Raises BudgetError for sizes that the plan doesn't lead to, with the first place that shows it.
    """
    rows: dict[Place, dict[int, int]] = {}
    for g, group in enumerate(plan.groups):
        for m in group.members:
            of = rows.setdefault((m.parameter, m.dim), {})
            of[g] = of.get(g, 0) + m.index.shape[1]
    _check_fixed(plan, wanted, rows.keys() | replaced)
    full = np.diff(plan.offsets).tolist()
    # What the units of a place's groups have to make up: its size less the channels that always stay.
    due = {
        (name, dim): wanted[name][dim] - plan.shapes[name][dim] + sum(times * full[g] for g, times in of.items())
        for (name, dim), of in rows.items()
        if (name, dim) not in replaced
    }
    known: dict[int, int] = {}
    found = True
    while found:
        found = False
        for place, size in due.items():
            unknown = [g for g in rows[place] if g not in known]
            if len(unknown) == 1:
                rest = size - sum(times * known[g] for g, times in rows[place].items() if g in known)
                known[unknown[0]] = rest // rows[place][unknown[0]]
                found = True
    for place, size in due.items():
        _check(plan, place, wanted, {g: known.get(g) for g in rows[place]}, rows[place], size)
    return {group.name: known.get(g, group.n_units) for g, group in enumerate(plan.groups)}


def _check_fixed(plan: Plan, wanted: Shapes, movable: Set[Place]) -> None:
    for name, shape in plan.shapes.items():
        for dim, (have, want) in enumerate(zip(shape, wanted[name], strict=True)):
            if want > have:
                raise BudgetError(
                    f"{name} would have {want} channels along dim {dim} and has {have}: pruning can't add"
                )
            if want != have and (name, dim) not in movable:
                why = plan.frozen.get(f"{name}:{dim}", "they are not channels")
                raise BudgetError(f"{name} would have {want} of its {have} along dim {dim}, but these stay: {why}")


def _check(
    plan: Plan, place: Place, wanted: Shapes, known: Mapping[int, int | None], times: Mapping[int, int], size: int
) -> None:
    name, dim = place
    names = ", ".join(plan.groups[g].name for g in known)
    counts = {g: count for g, count in known.items() if count is not None}
    if len(counts) < len(known):
        raise BudgetError(f"how {names} share the {wanted[name][dim]} channels of {name} along dim {dim} is not said")
    total = sum(times[g] * count for g, count in counts.items())
    outside = [g for g, count in counts.items() if not 0 < count <= plan.groups[g].n_units]
    if total != size or outside:
        kinds = sorted({c.kind for c in plan.constraints for g in known if _touches(plan, c.rows, g)})
        told = ", ".join(f"{plan.groups[g].name} would keep {n} of {plan.groups[g].n_units}" for g, n in counts.items())
        raise BudgetError(
            f"{name} would have {wanted[name][dim]} of {plan.shapes[name][dim]} channels along dim {dim}, which no "
            f"keep-set gives: {told}{f' (constraints: {chr(44).join(kinds)})' if kinds else ''}"
        )


def _touches(plan: Plan, rows: np.ndarray, group: int) -> bool:
    return bool((plan.group_of[rows[rows >= 0]] == group).any())
