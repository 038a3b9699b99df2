"""The gate before slicing: keep-set, model and plan fit, and the sliced model's channels still go together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ..selection import violations
from ..tracing import Plan
from ..tracing.inputs import calls_of
from ..tracing.labels import Graph
from ..tracing.walk import Nodes, Walk
from .shapes import Sliced, owner_of, tables


class SliceError(ValueError):
    """A model can't be sliced as asked. The model is as it was."""


def check_model(model: nn.Module, plan: Plan) -> None:
    """The model has the parameters that the plan speaks of, whole."""
    nodes = Nodes.of(model)
    if type(model).__name__ != plan.model_class or nodes.shapes != dict(plan.shapes):
        differing = sorted(set(nodes.shapes.items()) ^ set(plan.shapes.items()))
        where = f"; first difference: {differing[0][0]}" if differing else ""
        raise SliceError(
            f"the plan is of another model ({plan.model_class}, here {type(model).__name__}){where}. "
            "A model that was pruned needs a new plan: call trace() again"
        )
    for name, _, _, t in tables(model):
        if t.device.type == "meta":
            raise SliceError(f"{name} is on the meta device and has no data to slice: load the weights first")


def check_keep(plan: Plan, keep: Mapping[str, Any], norm_groups: str) -> dict[str, np.ndarray]:
    """The keep-set as int64 arrays, or an error that says what is wrong with it."""
    if norm_groups not in ("exact", "count"):
        raise SliceError(f"norm_groups={norm_groups!r} is not one of 'exact', 'count'")
    arrays = {n: np.asarray(v.cpu() if isinstance(v, torch.Tensor) else v) for n, v in keep.items()}
    bad = violations(plan, arrays, norm_groups)
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise SliceError(f"the keep-set can't be sliced: {bad[0]}{more}")
    return {n: v.astype(np.int64) for n, v in arrays.items()}


class _Gate(Graph):
    """A graph that compares instead of collecting: every meeting must be one that the plan allows."""

    def __init__(self, n_nodes: int, plan: Plan, sliced: Sliced, norm_groups: str, nodes: Nodes) -> None:
        super().__init__(n_nodes)
        self.norm_groups = norm_groups
        self.unit_of = np.full(n_nodes, -1, np.int64)
        alive = np.zeros(plan.n_units + 1, bool)
        alive[-1] = True  # the entry that unit -1 reads
        for g, group in enumerate(plan.groups):
            start = plan.offsets[g]
            units = sliced.keep.get(group.name)
            alive[start + (np.arange(group.n_units) if units is None else units)] = True
            for m in group.members:
                self.unit_of[nodes.start[m.parameter, m.dim] + m.index] = start + np.arange(group.n_units)[:, None]
        self.alive = alive
        self.allowed = {self._key(c.kind, c.rows) for c in plan.constraints}

    def _key(self, kind: str, rows: np.ndarray) -> tuple[str, bytes]:
        """Rows with what stays of them; an instance norm, and a norm in "count" mode, have no rows to keep apart."""
        left = [row[self.alive[row]] for row in rows]
        if kind == "instance_norm" or (kind == "norm" and self.norm_groups == "count"):
            return kind, np.concatenate(left).tobytes()
        return kind if "norm" in kind else "", b"|".join([row.tobytes() for row in left])

    def constrain(self, kind: str, place: str, rows: np.ndarray) -> None:
        super().constrain(kind, place, rows)
        units = self.unit_of[rows]
        if (units < 0).all() or ("norm" not in kind and (units == units[:, :1]).all()):
            return
        if kind == "instance_norm":  # or a norm that keeps one channel in each group
            if self._key(kind, units) in self.allowed or self._key("norm", units) in self.allowed:
                return
        elif rows.shape[0] == 1 or self._key(kind, units) in self.allowed:
            return
        what = "norm groups" if "norm" in kind else "rows"
        raise SliceError(f"after slicing, the {what} of {place} would hold other channels than before")

    def compare(self) -> None:
        """All edges join channels of one unit (or channels that stay); all that is frozen stays."""
        for a, b, place in self.edges:
            if not np.array_equal(self.unit_of[a], self.unit_of[b]):
                raise SliceError(f"after slicing, {place} would bring together channels that don't belong together")
        for a, reason in self.frozen:
            if (self.unit_of[a] >= 0).any():
                raise SliceError(f"after slicing, a channel that was removed elsewhere {reason}")


@contextmanager
def attributes_set(model: nn.Module, attributes: Mapping[str, Any]) -> Iterator[None]:
    """The new attribute values for the time of a dry run."""
    old = {path: getattr(*owner_of(model, path)) for path in attributes}
    try:
        for path, value in attributes.items():
            setattr(*owner_of(model, path), value)
        yield
    finally:
        for path, value in old.items():
            setattr(*owner_of(model, path), value)


def retrace(
    model: nn.Module,
    plan: Plan,
    sliced: Sliced,
    norm_groups: str,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None,
) -> None:
    """Trace the sliced model on meta, with the labels of the channels that it kept, against the plan."""
    nodes = Nodes.of(model)
    gate = _Gate(nodes.total, plan, sliced, norm_groups, nodes)
    walk = Walk(model, nodes, gate)
    with attributes_set(model, sliced.attributes):
        try:
            walk.go(model, calls_of(model, example_inputs), sliced.kept)
        except SliceError:
            raise
        except Exception as error:
            where = f" in {walk.stack[-1]!r}" if walk.stack else ""
            raise SliceError(
                f"the sliced {type(model).__name__} would not run: {error}{where}. Its forward probably reads a size "
                "from an attribute; keep the groups that it concerns whole (ignore=[...])"
            ) from error
    gate.compare()
    if tuple(walk.constants) != plan.constants:
        pairs = zip(walk.constants, plan.constants)
        place = next((p for (p, v), old in pairs if (p, v) != old), "the forward")
        raise SliceError(f"after slicing, a number used in {place} would change: it follows the width of the model")
