"""From the walk's edges to the plan's groups: connected components, then equal signatures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import nn

from ..architectures.attributes import PARAMETER_ATTRIBUTES
from ..module_tree import modules_of
from ..plan.fixes import NormFix, ScaleFix
from ..plan.plan import UNUSED, Attribute, Constraint, Cost, Extents, Group, Member, Plan
from .channels import Channels
from .computed_weights import with_cures
from .graph import Graph
from .walk import Walk

# Of which module a parameter is the weight, or the norm or direction that a weight is computed from.
_WEIGHT = re.compile(r"\.(weight|weight_[gv]|parametrizations\.weight\.original\d?)$")


def build_plan(model: nn.Module, walk: Walk) -> Plan:
    """Turn a finished walk into a plan."""
    channels, graph = walk.channels, walk.graph
    component, frozen_reason = _components(graph)
    if _keep_whole_groups(graph, component):
        component, frozen_reason = _components(graph)
    places = list(channels.start)
    starts = np.array([channels.start[p] for p in places] + [channels.total], np.int64)
    free = np.flatnonzero((component >= 0) & (frozen_reason[component] < 0))
    unit_of, tables = _group(component, free, starts)
    groups = _name_groups(channels, places, tables)
    offsets = np.concatenate([[0], np.cumsum([g.n_units for g in groups])]).astype(np.int64)
    extents, costs, attributes = _extents(model, walk, unit_of, offsets, groups)
    return Plan(
        model_class=type(model).__name__,
        groups=groups,
        constraints=_constraints(graph, unit_of, offsets),
        frozen=with_cures(model, _frozen(graph, component, frozen_reason, places, starts)),
        shapes=channels.shapes,
        buffers=channels.buffers,
        scale_fixes=_scale_fixes(walk, unit_of),
        attributes=attributes,
        costs=costs,
        extents=extents,
        notes=tuple(walk.notes),
        norm_fixes=_norm_fixes(walk, groups),
    )


def _components(graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    """The component of every channel (-1: untouched), and why each of them is frozen (first reason's index, or -1)."""
    empty = np.zeros(0, np.int32)
    a = np.concatenate([e[0] for e in graph.edges] or [empty])
    b = np.concatenate([e[1] for e in graph.edges] or [empty])
    touched = np.zeros(graph.n_channels, bool)
    touched[a] = touched[b] = True
    inner = (a != 0) & (b != 0) & (a != b)
    matrix = coo_matrix((np.ones(int(inner.sum()), np.int8), (a[inner], b[inner])), shape=(graph.n_channels,) * 2)
    n, component = connected_components(matrix.tocsr(), directed=False)
    reason = np.full(n + 1, -1, np.int64)
    outer = (a == 0) | (b == 0)
    if outer.any():
        # frozen by an edge to "always stays": the reason is the op that made the edge
        owner = np.repeat(np.arange(len(graph.edges)), [e[0].size for e in graph.edges])[outer]
        reason[component[np.maximum(a, b)[outer]]] = len(graph.frozen) + owner
    for i in range(len(graph.frozen) - 1, -1, -1):
        f = graph.frozen[i][0]
        touched[f] = True
        reason[component[f]] = i
    reason[component[0]] = max(reason[component[0]], 0)
    touched[0] = False
    return np.where(touched, component, -1), reason


def _keep_whole_groups(graph: Graph, component: np.ndarray) -> bool:
    """Freeze what could only go with a whole group of a convolution, whose other groups would then get its channels."""
    found = False
    for c in graph.constraints:
        if c.kind == "conv_groups":
            of_rows = component[c.rows]
            whole = (of_rows == of_rows[:, :1]).all(axis=1) & (of_rows[:, 0] >= 0)
            if whole.any():
                graph.freeze(c.rows[whole].reshape(-1), f"would take a whole group of {c.place} with it")
                found = True
    return found


def _group(
    component: np.ndarray, free: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, list[list[tuple[int, np.ndarray]]]]:
    """Units with the same places and multiplicities form a group.

    Returns the plan-wide unit per channel (-1: stays), and per group its (place, index table) list.
    """
    unit_of = np.full(component.size, -1, np.int64)
    if not free.size:
        return unit_of, []
    cuts = np.searchsorted(free, starts)
    present = np.zeros(int(component.max()) + 1, np.int64)
    present[component[free]] = 1
    unit = np.cumsum(present)
    unit -= 1  # of a temporary NumPy would ask the stack whose it is, which crashes where there is no memory left
    unit = unit[component[free]]
    # A sum of one random number per channel's place tells the units' multisets of places apart.
    signature = np.zeros(int(unit.max()) + 1, np.uint64)
    bits = np.random.default_rng(0).integers(1, 2**63, len(starts), dtype=np.uint64)
    np.add.at(signature, unit, np.repeat(bits[:-1], np.diff(cuts)))
    first = np.full(signature.size, component.size, np.int64)
    np.minimum.at(first, unit, free)
    _, kind = np.unique(signature, return_inverse=True)
    lead = np.full(int(kind.max()) + 1, component.size, np.int64)
    np.minimum.at(lead, kind, first)
    rank = np.empty(lead.size, np.int64)
    rank[np.argsort(lead)] = np.arange(lead.size)
    kind = rank[kind]
    order = np.lexsort((first, kind))
    new_id = np.empty(order.size, np.int64)
    new_id[order] = np.arange(order.size)
    unit_of[free] = new_id[unit]
    group_of_unit = kind[order]
    n_units = np.bincount(group_of_unit)
    place = np.repeat(np.arange(len(starts) - 1), np.diff(cuts))
    by = np.lexsort((unit_of[free], place))
    place, group = place[by], group_of_unit[unit_of[free[by]]]
    index = free[by] - starts[place]
    parts = np.flatnonzero((np.diff(place) != 0) | (np.diff(group) != 0)) + 1
    tables: list[list[tuple[int, np.ndarray]]] = [[] for _ in range(lead.size)]
    for start, stop in pairwise([0, *parts.tolist(), by.size]):
        g = int(group[start])
        tables[g].append((int(place[start]), index[start:stop].reshape(n_units[g], -1)))
    return unit_of, tables


def _name_groups(
    channels: Channels, places: Sequence[tuple[str, int]], tables: list[list[tuple[int, np.ndarray]]]
) -> tuple[Group, ...]:
    used: dict[str, int] = {}
    groups = []
    for table in tables:
        members = tuple([Member(places[p][0], places[p][1], index) for p, index in table])
        producing = [m for m in members if m.dim == 0 and len(channels.shapes[m.parameter]) > 1]
        name = _WEIGHT.sub("", (producing or list(members))[0].parameter)
        used[name] = used.get(name, 0) + 1
        if used[name] > 1:
            name = f"{name}#{used[name]}"
        groups.append(Group(name, len(members[0].index), members))
    return tuple(groups)


def _constraints(graph: Graph, unit_of: np.ndarray, offsets: np.ndarray) -> tuple[Constraint, ...]:
    """The walk's constraints over units, without those that always hold and without repetitions."""
    seen: set[tuple[str, bytes, tuple[int, ...]]] = set()
    out = []
    for c in graph.constraints:
        rows = free_rows(c.kind, unit_of[c.rows])
        if (rows < 0).all() or (rows.shape[0] == 1 and c.kind == "heads"):
            continue
        if c.kind not in ("norm", "instance_norm") and (rows == rows[:, :1]).all() and (rows >= 0).all():
            continue
        key = (c.kind if "norm" in c.kind else "", rows.tobytes(), rows.shape)
        if key in seen:
            continue
        seen.add(key)
        out.append(Constraint(c.kind, c.place, rows))
    return tuple(out)


def free_rows(kind: str, rows: np.ndarray) -> np.ndarray:
    """Head dims of queries and keys that all stay don't hold the values', nor these them.

    Where a forward views the one with the other's head size after all, the probe finds it.
    """
    return rows[(rows >= 0).any(axis=1)] if kind == "heads" else rows


def _scale_fixes(walk: Walk, unit_of: np.ndarray) -> tuple[ScaleFix, ...]:
    """Every row takes its factor once, also where queries serve two attentions (text and image)."""
    fixes = []
    taken: dict[str, np.ndarray] = {}
    for s in walk.scales:
        units = unit_of[s.first_row]
        if (units >= 0).any():
            targets = []
            for name, rows in s.targets.items():
                done = taken.setdefault(name, np.zeros(walk.channels.shapes[name][0], bool))
                rows = rows[~done[rows]]
                done[rows] = True
                if rows.size:
                    targets.append((name, rows))
            if targets:
                fixes.append(ScaleFix(s.place, s.n_dims, units, tuple(targets)))
    return tuple(fixes)


def _norm_fixes(walk: Walk, groups: Sequence[Group]) -> tuple[NormFix, ...]:
    """Of the weights by their norm, those that lose channels."""
    sliced = {m.parameter for g in groups for m in g.members}
    return tuple([NormFix(gain, v) for gain, v in walk.gains.items() if v in sliced])


def _frozen(
    graph: Graph, component: np.ndarray, reason: np.ndarray, places: Sequence[tuple[str, int]], starts: np.ndarray
) -> dict[str, str]:
    found: dict[str, str] = {}
    if not places:
        return found
    why = np.where(component >= 0, reason[component], -1)
    used = np.logical_or.reduceat(component >= 0, starts[:-1])
    stays = np.logical_or.reduceat(why >= 0, starts[:-1])
    for i in np.flatnonzero(~used | stays).tolist():
        name, dim = places[i]
        if not used[i]:
            found[f"{name}:{dim}"] = UNUSED
        else:
            part = why[starts[i] : starts[i + 1]]
            first = int(part[part >= 0][0])
            n = len(graph.frozen)
            found[f"{name}:{dim}"] = (
                graph.frozen[first][1] if first < n else f"meets channels that stay in {graph.edges[first - n][2]}"
            )
    return found


def _extents(
    model: nn.Module, walk: Walk, unit_of: np.ndarray, offsets: np.ndarray, groups: tuple[Group, ...]
) -> tuple[Extents, tuple[Cost, ...], tuple[Attribute, ...]]:
    """Number the distinct label sets whose sizes costs and attributes follow."""
    index: dict[bytes, int] = {}
    sets: list[np.ndarray] = []

    def number(label_map: np.ndarray) -> int:
        key = label_map.tobytes()
        if key not in index:
            index[key] = len(sets)
            sets.append(label_map.reshape(-1))
        return index[key]

    costs = tuple([Cost(c.place, c.scale, tuple([number(x) for x in c.maps]), c.attention) for c in walk.costs])
    attributes = [Attribute(m, a, number(x.astype(np.int32))) for (m, a), x in walk.attributes.items()]
    attributes += [Attribute(m, a, number(x.astype(np.int32)), -0.5) for (m, a), x in walk.scale_attributes.items()]
    known = set(walk.attributes)
    for name, module in modules_of(model).items():
        for attribute, (parameter, dim) in PARAMETER_ATTRIBUTES.get(type(module).__name__, {}).items():
            start = walk.channels.start.get((f"{name}.{parameter}".lstrip("."), dim))
            if start is None or (name, attribute) in known:
                continue
            size = walk.channels.shapes[f"{name}.{parameter}".lstrip(".")][dim]
            if getattr(module, attribute, None) != size:
                continue
            attributes.append(Attribute(name, attribute, number(np.arange(start, start + size, dtype=np.int32))))
    base = np.zeros(len(sets), np.int64)
    per_group = np.zeros((len(sets), len(groups)), np.float64)
    for i, s in enumerate(sets):
        units = unit_of[s]
        base[i] = int((units < 0).sum())
        g = np.searchsorted(offsets, units[units >= 0], side="right") - 1
        per_group[i] = np.bincount(g, minlength=len(groups)) / np.maximum(np.diff(offsets), 1)
    if (per_group == per_group.round()).all():
        per_group = per_group.astype(np.int64)
    return Extents(base, per_group), costs, tuple(attributes)
