"""The gate: a sliced model, walked with the labels of the channels that it kept, must agree with its plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from .errors import TraceError, where_in
from .grouping import free_rows
from .labels import Graph
from .nodes import Nodes
from .numbers import Step, changed
from .plan import Plan
from .walk import Calls, Walk


class GateError(ValueError):
    """The sliced model would not run, or its channels would not go together as the plan says.

    nodes: the channels that the failure concerns. sizes: the sizes that the failing operation was asked for.
    """

    def __init__(self, message: str, nodes: np.ndarray, sizes: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.nodes = nodes
        self.sizes = sizes


@dataclass(frozen=True)
class Sliced:
    """A keep-set worked out.

    kept: ``(parameter, dim)`` to the sorted indices that stay, for the places that lose any. shapes: all parameters
    and floating-point buffers afterwards. attributes: ``"module.path.attribute"`` to its new value.
    """

    keep: dict[str, np.ndarray]
    kept: dict[tuple[str, int], np.ndarray]
    shapes: dict[str, tuple[int, ...]]
    attributes: dict[str, int | float | tuple[int, ...]]


def sliced_shapes(model: nn.Module, plan: Plan, keep: Mapping[str, np.ndarray]) -> Sliced:
    """Work out which indices of which parameter stay, and what the attributes become."""
    masks: dict[tuple[str, int], np.ndarray] = {}
    for group in plan.groups:
        units = keep.get(group.name)
        if units is None or len(units) == group.n_units:
            continue
        gone = np.ones(group.n_units, bool)
        gone[units] = False
        for m in group.members:
            place = (m.parameter, m.dim)
            if place not in masks:
                masks[place] = np.ones(plan.shapes[m.parameter][m.dim], bool)
            masks[place][m.index[gone]] = False
    kept = {place: np.flatnonzero(mask) for place, mask in masks.items()}
    shapes = dict(plan.shapes)
    for (name, dim), index in kept.items():
        shape = list(shapes[name])
        shape[dim] = index.size
        shapes[name] = tuple(shape)
    before, after = plan.extents.at(plan.counts()), plan.extents.at(plan.counts(keep))
    modules = dict(model.named_modules())
    attributes: dict[str, int | float | tuple[int, ...]] = {}
    for a in plan.attributes:
        if before[a.extent] != after[a.extent]:
            old, new = getattr(modules[a.module], a.name), round(float(after[a.extent]))
            value = float(new**a.power) if a.power != 1 else (*old[:-1], new) if isinstance(old, tuple) else new
            attributes[f"{a.module}.{a.name}".lstrip(".")] = value
    return Sliced(dict(keep), kept, shapes, attributes)


def alive_units(plan: Plan, keep: Mapping[str, np.ndarray]) -> np.ndarray:
    """``(n_units + 1,)`` bool: which units stay; the last entry answers for unit -1, what always stays."""
    alive = np.zeros(plan.n_units + 1, bool)
    alive[-1] = True
    for g, group in enumerate(plan.groups):
        units = keep.get(group.name)
        alive[plan.offsets[g] + (np.arange(group.n_units) if units is None else units)] = True
    return alive


def units_of_nodes(plan: Plan, nodes: Nodes) -> np.ndarray:
    """``(n_nodes,)``: the plan-wide unit of every channel, -1 for those that stay."""
    unit_of = np.full(nodes.total, -1, np.int64)
    for g, group in enumerate(plan.groups):
        for m in group.members:
            unit_of[nodes.start[m.parameter, m.dim] + m.index] = plan.offsets[g] + np.arange(group.n_units)[:, None]
    return unit_of


class Gate(Graph):
    """A graph that compares instead of collecting: every meeting must be one that the plan allows."""

    def __init__(self, nodes: Nodes, plan: Plan, sliced: Sliced, norm_groups: str) -> None:
        super().__init__(nodes.total)
        self.norm_groups = norm_groups
        self.unit_of = units_of_nodes(plan, nodes)
        self.alive = alive_units(plan, sliced.keep)
        self.allowed = {self._key(c.kind, c.rows) for c in plan.constraints}

    def _key(self, kind: str, rows: np.ndarray) -> tuple[str, bytes]:
        """Rows with what stays of them; an instance norm, and a norm in "count" mode, have no rows to keep apart."""
        left = [row[self.alive[row]] for row in rows]
        if kind == "instance_norm" or (kind == "norm" and self.norm_groups == "count"):
            return kind, np.concatenate(left).tobytes()
        return kind if "norm" in kind else "", b"|".join([row.tobytes() for row in left])

    def constrain(self, kind: str, place: str, rows: np.ndarray) -> None:
        super().constrain(kind, place, rows)
        units = free_rows(kind, self.unit_of[rows])
        if (units < 0).all() or ("norm" not in kind and (units == units[:, :1]).all()):
            return
        if kind == "instance_norm":  # or a norm that keeps one channel in each group
            if self._key(kind, units) in self.allowed or self._key("norm", units) in self.allowed:
                return
        elif units.shape[0] == 1 or self._key(kind, units) in self.allowed:
            return
        what = "norm groups" if "norm" in kind else "rows"
        message = f"after slicing, the {what} of {place} would hold other channels than before"
        raise GateError(message, rows.reshape(-1), rows.shape[1:])

    def goes_whole(self, rows: np.ndarray, n_heads: int, module: str) -> bool:
        """The plan knows: a row's channels are one unit."""
        units = self.unit_of[rows]
        return bool((units >= 0).all() and (units == units[:, :1]).all())

    def compare(self) -> None:
        """All edges join channels of one unit (or channels that stay); all that is frozen stays."""
        for a, b, place in self.edges:
            if not np.array_equal(self.unit_of[a], self.unit_of[b]):
                raise GateError(
                    f"after slicing, {place} would bring together channels that don't belong together",
                    np.concatenate([a, b]),
                )
        for a, reason in self.frozen:
            if (self.unit_of[a] >= 0).any():
                raise GateError(f"after slicing, a channel that was removed elsewhere {reason}", a)


@contextmanager
def _attributes_set(model: nn.Module, attributes: Mapping[str, Any]) -> Iterator[None]:
    """The new attribute values for the time of a walk."""
    modules = dict(model.named_modules())  # get_submodule walks the path anew for each of a thousand attributes
    owners = [(modules[path.rpartition(".")[0]], path.rpartition(".")[2]) for path in attributes]
    old = [getattr(module, name) for module, name in owners]
    try:
        for (module, name), value in zip(owners, attributes.values()):
            setattr(module, name, value)
        yield
    finally:
        for (module, name), value in zip(owners, old):
            setattr(module, name, value)


def pass_gate(
    model: nn.Module,
    plan: Plan,
    sliced: Sliced,
    norm_groups: str,
    calls: Calls,
    steps: Sequence[Step] | None = None,
) -> None:
    """Walk the sliced model on meta against the plan; nothing of the model changes.

    steps: what the unsliced model computes in these calls; without them it is walked as well.

    Raises:
        GateError: it would not run, or channels, norm groups, heads or numbers would not be what they were.
    """
    nodes = Nodes.of(model)
    steps = _unsliced(model, plan, nodes, norm_groups, calls) if steps is None else steps
    gate = Gate(nodes, plan, sliced, norm_groups)
    walk = Walk(model, nodes, gate)
    with _attributes_set(model, sliced.attributes):
        try:
            walk.go(model, calls, sliced.kept)
        except GateError:
            raise
        except Exception as error:
            where = where_in(walk, error)
            raise GateError(
                f"the sliced {type(model).__name__} would not run: {error or type(error).__name__}{where}. Its forward "
                "reads a size from elsewhere; keep the groups that it concerns whole (ignore=[...])",
                *_failed(walk),
            ) from error
    gate.compare()
    found = changed(steps, walk.steps)
    if found is not None:
        step, what = found
        message = f"after slicing, {what} used in {step.place} would change: it follows the width of the model"
        raise GateError(message, step.nodes)


def _unsliced(model: nn.Module, plan: Plan, nodes: Nodes, norm_groups: str, calls: Calls) -> list[Step]:
    """What the model computes as it is."""
    walk = Walk(model, nodes, Gate(nodes, plan, sliced_shapes(model, plan, {}), norm_groups))
    try:
        walk.follow(model, calls)
    except TraceError as error:
        raise GateError(str(error), np.zeros(0, np.int32)) from error
    return walk.steps


def _failed(walk: Walk) -> tuple[np.ndarray, tuple[int, ...]]:
    """The channels of the operation that failed, and the sizes that it was asked for."""
    args = walk.failed if walk.failed is not None else ()
    labels = [walk.labels(t) for t in walk.tensors(list(args))]
    nodes = [x.reshape(-1) for found in labels if found is not None for x in found.layers]
    sizes = [n for a in args if isinstance(a, (list, tuple)) for n in a if isinstance(n, int)]
    return np.concatenate(nodes) if nodes else np.zeros(0, np.int32), tuple(sizes)
