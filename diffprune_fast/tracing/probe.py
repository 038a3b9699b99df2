"""Widths that a forward reads from elsewhere: found by slicing a model on meta before its plan is handed on.

Labels show which channels go together, not where a forward takes a size from: ``h.view(b, -1, self.inner_dim)``, or
``text.view(b, -1, image.shape[-1])``. So a first plan is tried with uneven keep-sets. Where the walk fails, two groups
whose sizes the failing operation confuses are tied to equal counts; otherwise the group stays whole, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from ..plan.keep_sets import alive_units, sliced_shapes
from ..plan.lattice import lattice, rank_units
from ..plan.plan import Plan
from .channels import units_of_channels
from .grouping import build_plan
from .records import Calls, Step
from .steps import first_difference
from .verification import VerificationError, unsliced_steps, verify_sliced
from .walk import Walk

Row = tuple[int, ...]  # the channels along one dim of a parameter


# Every round settles at least one group; a model with more hidden couplings than this is left to verification.
ROUNDS = 24

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a block's, in a parameter's name


def probe_plan(model: nn.Module, walk: Walk, plan: Plan, calls: Calls) -> Plan:
    """The plan, with groups tied or frozen until uneven keep-sets of it are verified."""
    suspects: dict[Row, set[Row]] = {}
    for turn in range(ROUNDS):
        keep = _uneven(plan, turn)
        error = _try(model, walk, plan, keep, calls)
        if error is None:
            return plan
        groups = _concerned(walk, plan, keep, error)
        if not groups:
            groups = _followed(model, walk, plan, keep, calls, error)
        if not groups:
            groups = _culprits(model, walk, plan, keep, calls, _shrunk_clusters(plan, keep))
        reason = f"has a width that is read elsewhere ({str(error).partition('. Its forward')[0]})"
        if not groups:
            return plan
        row, twins = _twins(walk, plan, keep, error)
        twins = suspects[row] = suspects.get(row, twins) & twins
        if len(twins) > 1:
            continue  # another keep-set tells them apart
        for twin in twins:
            walk.graph.constrain("size", error.place, np.array([row, twin], np.int32))
        for name in () if twins else [*groups, *_same_elsewhere(model, walk, plan, keep, calls, groups)]:
            walk.graph.freeze(_first_channels(walk, plan, name), reason)
        suspects.clear()
        plan = build_plan(model, walk)
    return plan


def _try(
    model: nn.Module, walk: Walk, plan: Plan, keep: Mapping[str, np.ndarray], calls: Calls
) -> VerificationError | None:
    def unsliced() -> Sequence[Step]:
        """Walked a second time; once that has shown nothing new, no more."""
        if walk.repeats:
            return walk.steps
        steps = unsliced_steps(model, plan, "count", calls)
        walk.repeats = first_difference(walk.steps, steps) is None
        return steps

    try:
        verify_sliced(model, plan, sliced_shapes(model, plan, keep), "count", calls, walk.steps, unsliced)
    except VerificationError as error:
        return error
    return None


def _uneven(plan: Plan, turn: int) -> dict[str, np.ndarray]:
    """An allowed keep-set in which groups of equal size keep different counts, as far as that goes."""
    of = lattice(plan, "count")
    seen: dict[int, int] = {}
    chosen = of.levels.copy()
    for c in np.random.default_rng(turn).permutation(len(of.allowed)).tolist():
        choices, levels = of.allowed[c], int(of.levels[c])
        if len(choices) > 1:
            chosen[c] = choices[len(choices) - 2 - seen.get(levels, 0) % (len(choices) - 1)]
            seen[levels] = seen.get(levels, 0) + 1
    stays = rank_units(of, np.random.default_rng(turn).random(plan.n_units), "independent").kept(chosen)
    return plan.keep_of(stays)


def _concerned(walk: Walk, plan: Plan, keep: Mapping[str, np.ndarray], error: VerificationError) -> list[str]:
    """The groups of the channels at which the walk failed, or else those that have the size it was asked for."""
    units = units_of_channels(plan, walk.channels)[error.channels]
    groups = np.unique(plan.group_of[units[units >= 0]])
    return [plan.groups[g].name for g in groups] or [n for n in keep if len(keep[n]) in error.sizes]


def _followed(
    model: nn.Module,
    walk: Walk,
    plan: Plan,
    keep: Mapping[str, np.ndarray],
    calls: Calls,
    error: VerificationError,
) -> list[str]:
    """The groups that an attribute of the failing module follows, if its value was asked for and they fail alone."""
    module, sizes = error.place.rpartition(" (")[0], plan.extents.at(plan.counts(keep))
    extents = [a.extent for a in plan.attributes if a.module == module and sizes[a.extent] in error.sizes]
    followed = np.flatnonzero(plan.extents.per_group[extents].sum(axis=0))
    part = {g.name for g in (plan.groups[i] for i in followed) if len(keep[g.name]) < g.n_units}
    return sorted(part) if _fail(model, walk, plan, keep, calls, part) else []


def _same_elsewhere(
    model: nn.Module,
    walk: Walk,
    plan: Plan,
    keep: Mapping[str, np.ndarray],
    calls: Calls,
    groups: Sequence[str],
) -> list[str]:
    """The groups at the same place in other blocks, if they fail without these: blocks of one class run one code."""
    places = {_place_in_block(plan, name) for name in groups}
    others = {n for n in keep if len(keep[n]) < plan[n].n_units and _place_in_block(plan, n) in places} - {*groups}
    return sorted(others) if _fail(model, walk, plan, keep, calls, others) else []


def _place_in_block(plan: Plan, name: str) -> tuple[int, tuple[tuple[str, int], ...]]:
    group = plan[name]
    return group.n_units, tuple([(_NUMBER.sub("#", m.parameter), m.dim) for m in group.members])


def _fail(
    model: nn.Module, walk: Walk, plan: Plan, keep: Mapping[str, np.ndarray], calls: Calls, groups: set[str]
) -> bool:
    """Whether the clusters of these groups fail when nothing else shrinks."""
    part = {n: keep[n] for cluster in _shrunk_clusters(plan, keep) if groups & {*cluster} for n in cluster}
    return bool(part) and _try(model, walk, plan, part, calls) is not None


def _culprits(
    model: nn.Module,
    walk: Walk,
    plan: Plan,
    keep: Mapping[str, np.ndarray],
    calls: Calls,
    clusters: Sequence[Sequence[str]],
) -> list[str]:
    """The clusters of groups that fail on their own, by halving: for failures that name no channel."""
    part = {n: keep[n] for names in clusters for n in names}
    if not part or _try(model, walk, plan, part, calls) is None:
        return []
    if len(clusters) == 1:
        return list(clusters[0])
    half = len(clusters) // 2
    found = [_culprits(model, walk, plan, keep, calls, side) for side in (clusters[:half], clusters[half:])]
    return [*found[0], *found[1]]


def _shrunk_clusters(plan: Plan, keep: Mapping[str, np.ndarray]) -> list[list[str]]:
    """Groups that constraints tie to one another, without those that keep everything."""
    clusters: dict[int, list[str]] = {}
    for g, c in zip(plan.groups, lattice(plan, "count").cluster.tolist()):
        if len(keep[g.name]) < g.n_units:
            clusters.setdefault(c, []).append(g.name)
    return list(clusters.values())


def _twins(walk: Walk, plan: Plan, keep: Mapping[str, np.ndarray], error: VerificationError) -> tuple[Row, set[Row]]:
    """The width at which the walk failed, and those as wide whose kept count the operation asked for instead."""
    unit_of, alive = units_of_channels(plan, walk.channels), alive_units(plan, keep)
    rows: dict[bytes, Row] = {}
    left: dict[Row, int] = {}
    failed: list[Row] = []
    for (name, dim), start in walk.channels.start.items():
        channels = np.arange(start, start + walk.channels.shapes[name][dim])
        stay = alive[unit_of[channels]]
        if not stay.all():
            row = rows.setdefault(np.sort(unit_of[channels]).tobytes(), tuple(channels.tolist()))
            left[row] = int(stay.sum())
            if np.isin(channels[stay], error.channels).all() or (not error.channels.size and left[row] in error.sizes):
                failed.append(row)
    for row in failed:
        twins = {x for x, n in left.items() if len(x) == len(row) and n != left[row] and n in error.sizes}
        if twins:
            return row, twins
    return (), set()


def _first_channels(walk: Walk, plan: Plan, name: str) -> np.ndarray:
    """One channel of every unit of a group, ``(n_units,)``."""
    member = plan[name].members[0]
    return walk.channels.start[member.parameter, member.dim] + member.index[:, 0].astype(np.int32)
