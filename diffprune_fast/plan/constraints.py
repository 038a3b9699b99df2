"""What a keep-set must respect, checked on plain data."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..choices import NormGroups, check_choice
from .plan import Constraint, Plan

# Units per group, and channels per head or piece, that stay at least: a width of 1 broadcasts, so a forward with a
# mistake in it would run on, and a head of one channel is no head.
LEAST = 2


def violations(plan: Plan, keep: Mapping[str, np.ndarray], norm_groups: NormGroups = "count") -> list[str]:
    """Say everything that is wrong with a keep-set; an empty list means that it may be sliced.

    keep: group name to the sorted, unique unit indices of that group that stay; a group that isn't named stays whole.
    norm_groups: ``"exact"`` asks every norm group to keep equally many channels, ``"count"`` only that the channels
    that stay can be divided among the norm groups. Every other constraint holds in both modes.

    Raises ValueError for an unknown ``norm_groups``.
    """
    check_choice("norm_groups", norm_groups, NormGroups)
    kept = np.ones(plan.n_units + 1, bool)  # the last entry answers for -1, the channels that always stay
    found = []
    for name, units in keep.items():
        if name not in plan.position:
            found.append(f"group {name!r} is not in the plan")
            continue
        g = plan.position[name]
        wrong = _wrong_indices(np.asarray(units), plan.groups[g].n_units)
        if wrong:
            found.append(f"group {name!r}: {wrong}")
            continue
        kept[plan.offsets[g] : plan.offsets[g + 1]] = False
        kept[plan.offsets[g] + np.asarray(units)] = True
    for constraint in plan.constraints:
        wrong = _broken(constraint, kept, norm_groups)
        if wrong:
            found.append(f"{constraint.kind} at {constraint.place}: {wrong}")
    return found


def _wrong_indices(units: np.ndarray, n_units: int) -> str:
    if units.size < min(LEAST, n_units):
        return f"{units.size or 'no'} unit stays; at least {LEAST} must"
    if units.ndim != 1 or not np.issubdtype(units.dtype, np.integer):
        return f"unit indices must be a vector of integers, not {units.dtype} of shape {units.shape}"
    if units.min() < 0 or units.max() >= n_units:
        return f"unit indices {units.min()}..{units.max()} don't fit into 0..{n_units - 1}"
    steps = np.diff(units)
    if (steps == 0).any():
        return f"unit {units[:-1][steps == 0][0]} is named twice"
    if (steps < 0).any():
        return "unit indices are not sorted"
    return ""


def _broken(constraint: Constraint, kept: np.ndarray, norm_groups: str) -> str:
    rows = constraint.rows
    if rows.size == 0 or always_holds(constraint):
        return ""
    counts = kept[rows].sum(axis=1)
    total = int(counts.sum())
    if total == 0:
        return "no channel stays"
    if constraint.kind == "norm" and norm_groups == "count":
        if total % len(rows):
            return f"{total} channels stay, which {len(rows)} norm groups can't share equally"
    elif constraint.kind != "norm" and counts.min() < min(LEAST, rows.shape[1]):
        return f"a row keeps {counts.min()} channel; at least {LEAST} must stay"
    elif (counts != counts[0]).any():
        other = int(np.argmax(counts != counts[0]))
        return (
            f"row 0 keeps {counts[0]} channels and row {other} keeps {counts[other]}; all rows must keep equally many"
        )
    return ""


def always_holds(constraint: Constraint) -> bool:
    """Whether every row is one unit repeated: a row then goes as a whole and the others keep their size.

    Not so for a norm: its number of groups stays, so a row that goes would hand its place to others.
    """
    rows = constraint.rows
    return constraint.kind != "norm" and bool((rows == rows[:, :1]).all() and (rows[:, 0] >= 0).all())
