"""What a selection says of itself: what was asked and met, and everything in which the result departs from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..plan.lattice import Lattice
from ..plan.plan import Plan
from .budgets import UNITS, Budget
from .costs import Cost, words_of


def unreachable(budget: Budget, whole: float, least: float, max_ratio: float, cost: Cost | None = None) -> str:
    if cost is not None:
        limits = getattr(cost, "limits", None)
        return (
            f"{budget} can't be met: with these constraints, patterns, rounding and max_ratio={max_ratio:g} one gets "
            f"down to {least / max(whole, 1e-30):.3f} of {words_of(cost, whole)}"
            + ("" if limits is None else f"; {limits()}")
        )
    what = UNITS.get(budget.kind, "units")
    reach = f"{int(least):,} of {int(whole):,} {what} ({least / max(whole, 1):.3f})"
    if budget.kind == "ratio":
        reach += f", a ratio of {1 - least / max(whole, 1):.3f}"
    return (
        f"{budget} can't be met: with these constraints, patterns, rounding and max_ratio={max_ratio:g} one gets down "
        f"to {reach}"
    )


def smallest_step(of: Lattice, free: np.ndarray) -> str:
    steps = [1 - c[-2] / q for c, q, f in zip(of.allowed, of.levels.tolist(), free, strict=True) if f]
    if not steps:
        return "the groups that may be pruned have ratios of their own that round to nothing"
    return f"the finest step that constraints and rounding allow removes {min(steps):.3f} of a group"


def why_nothing(plan: Plan, ignore: Sequence[str]) -> str:
    if not plan.groups:
        reasons = sorted(set(plan.frozen.values()))
        return "everything is frozen" + (f": {reasons[0]}" if reasons else "")
    return "ignore names all that could be" if ignore else "constraints tie everything to channels that must stay"


def asked_and_met(
    plan: Plan, of: Lattice, budget: Budget, counts: np.ndarray, free: np.ndarray, costs: Mapping[str, Cost]
) -> tuple[str, str]:
    """The budget in words, and what the model costs by it and all else."""
    cost, whole = cost_of(plan, counts), plan.complexity()
    if (mine := costs.get(budget.kind)) is not None:
        all_there_is, left = float(mine(plan.counts())), float(mine(counts))
        asked = f"{budget} ({words_of(mine, budget.limit(all_there_is))} of {words_of(mine, all_there_is)})"
        return asked, f"{budget.kind} {left / all_there_is:.3f} ({words_of(mine, left)}); {cost}"
    if budget.kind == "ratio":
        return f"{budget} of the units", f"ratio={removed(of, counts, free):.3f} of the units; {cost}"
    all_of_it = whole.params if budget.kind == "params" else whole.macs
    return f"{budget} ({int(budget.limit(all_of_it)):,} of {all_of_it:,})", cost


def cost_of(plan: Plan, counts: np.ndarray) -> str:
    left, whole = plan.complexity(counts), plan.complexity()
    return (
        f"{left.params / 1e6:.2f}M of {whole.params / 1e6:.2f}M parameters ({left.params / max(whole.params, 1):.3f}), "
        f"{left.macs / 1e9:.4g} of {whole.macs / 1e9:.4g} GMACs ({left.macs / max(whole.macs, 1):.3f})"
    )


def removed(of: Lattice, counts: np.ndarray, free: np.ndarray) -> float:
    """The share of units that goes, of the groups that the budget may take from."""
    sizes, mine = of.group_sizes, free[of.cluster]
    return 1 - float(counts[mine].sum()) / float(sizes[mine].sum()) if mine.any() else 0.0


def notes_on(
    plan: Plan, of: Lattice, budget: Budget, chosen: np.ndarray, free: np.ndarray, rounding: str | None
) -> list[str]:
    notes = []
    met = removed(of, of.counts(chosen), free)
    if budget.kind == "ratio" and abs(met - budget.value) > 0.005:
        why = "widths move in the steps that constraints"
        why += f" and round_to={of.asked_rounding} allow" if of.asked_rounding > 1 else " allow"
        if rounding == "reference":
            why = "the reference rounds down, per norm group or head"
        notes.append(f"{met:.1%} of the units go instead of {budget.value:.1%}: {why}")
    tied = np.array([len(c) == 1 for c in of.allowed], bool)
    whole = (chosen == of.levels) & free
    if budget.kind == "ratio" and whole.any():
        notes.append(f"{named(plan, whole[of.cluster])} stay whole: their next step is further than the asked ratio")
    if tied.any():
        notes.append(f"{named(plan, tied[of.cluster])} stay whole: constraints leave them no other width")
    loose = (of.rounded < of.asked_rounding) & ~tied & (chosen < of.levels)
    if loose.any():
        to = ", ".join(str(r) for r in np.unique(of.rounded[loose]))
        notes.append(
            f"{named(plan, loose[of.cluster])}: widths are multiples of {to}, not of {of.asked_rounding}; "
            "constraints leave no such choice"
        )
    return notes


def named(plan: Plan, mask: np.ndarray) -> str:
    names = [plan.groups[g].name for g in np.flatnonzero(mask)]
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} group{'s' if len(names) > 1 else ''} ({shown})"
