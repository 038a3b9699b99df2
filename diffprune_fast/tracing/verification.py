"""Verification: a sliced model, walked with the labels of the channels that it kept, must agree with its plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import nn

from ..choices import NormGroups
from ..module_tree import modules_of
from ..plan.keep_sets import Sliced, alive_units, sliced_shapes
from ..plan.plan import Plan
from .caches import collector_paused
from .channels import Channels, units_of_channels
from .errors import TraceError, where_in
from .graph import Graph
from .grouping import free_rows
from .kept_steps import kept_steps
from .records import Calls, Step
from .steps import first_difference
from .tracer import Tracer, walk_forward
from .walk import Walk


class VerificationError(ValueError):
    """The sliced model would not run, or its channels would not go together as the plan says.

    place: the operation that failed. channels: those that the failure concerns. sizes: those that the operation was
    asked for.
    """

    def __init__(self, message: str, place: str, channels: np.ndarray, sizes: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.place = place
        self.channels = channels
        self.sizes = sizes


class Comparison(Graph):
    """A graph that compares instead of collecting: every meeting must be one that the plan allows."""

    def __init__(self, channels: Channels, plan: Plan, sliced: Sliced, norm_groups: NormGroups) -> None:
        super().__init__(channels.total)
        self.norm_groups = norm_groups
        self.unit_of = units_of_channels(plan, channels)
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
        may_go_whole = "norm" not in kind and kind != "conv_groups"
        if (units < 0).all() or (may_go_whole and (units == units[:, :1]).all()):
            return
        if kind == "instance_norm":  # or a norm that keeps one channel in each group
            if self._key(kind, units) in self.allowed or self._key("norm", units) in self.allowed:
                return
        elif units.shape[0] == 1 or self._key(kind, units) in self.allowed:
            return
        what = "norm groups" if "norm" in kind else "rows"
        message = f"after slicing, the {what} of {place} would hold other channels than before"
        raise VerificationError(message, place, rows.reshape(-1), rows.shape[1:])

    def goes_whole(self, rows: np.ndarray, n_heads: int, module: str) -> bool:
        """The plan knows: a row's channels are one unit."""
        units = self.unit_of[rows]
        return bool((units >= 0).all() and (units == units[:, :1]).all())

    def check_edges(self) -> None:
        """All edges join channels of one unit (or channels that stay); all that is frozen stays."""
        for a, b, place in self.edges:
            if not np.array_equal(self.unit_of[a], self.unit_of[b]):
                raise VerificationError(
                    f"after slicing, {place} would bring together channels that don't belong together",
                    place,
                    np.concatenate([a, b]),
                )
        for a, reason in self.frozen:
            if (self.unit_of[a] >= 0).any():
                raise VerificationError(f"after slicing, a channel that was removed elsewhere {reason}", "", a)


@contextmanager
def attributes_set(model: nn.Module, attributes: Mapping[str, Any]) -> Iterator[None]:
    """The new attribute values for the time of a walk."""
    modules = modules_of(model)  # get_submodule walks the path anew for each of a thousand attributes
    owners = [(modules[path.rpartition(".")[0]], path.rpartition(".")[2]) for path in attributes]
    old = [getattr(module, name) for module, name in owners]
    try:
        for (module, name), value in zip(owners, attributes.values()):
            setattr(module, name, value)
        yield
    finally:
        for (module, name), value in zip(owners, old):
            setattr(module, name, value)


@collector_paused()
def verify_sliced(
    model: nn.Module,
    plan: Plan,
    sliced: Sliced,
    norm_groups: NormGroups,
    calls: Calls,
    steps: Sequence[Step] | None = None,
    unsliced: Callable[[], Sequence[Step]] | None = None,
) -> None:
    """Walk the sliced model on meta against the plan; nothing of the model changes.

    steps: what the unsliced model computes in these calls; without them, and where its trace has left none, it is
    walked as well. unsliced: walks it where the sliced one seems to compute something else.

    Raises:
        VerificationError: it would not run, or channels, norm groups, heads or numbers would not be what they were.
    """
    channels = Channels.of(model)
    unsliced = unsliced or (lambda: unsliced_steps(model, plan, norm_groups, calls))
    steps = kept_steps(plan, model, calls) if steps is None else steps
    steps = unsliced() if steps is None else steps
    comparison = Comparison(channels, plan, sliced, norm_groups)
    tracer = Tracer(model, channels, comparison)
    walk = tracer.walk
    with attributes_set(model, sliced.attributes):
        try:
            tracer.run(model, calls, sliced.kept)
        except VerificationError:
            raise
        except Exception as error:
            where = where_in(walk.module, error)
            raise VerificationError(
                f"the sliced {type(model).__name__} would not run: {error or type(error).__name__}{where}. Its forward "
                "reads a size from elsewhere; keep the groups that it concerns whole (ignore=[...])",
                *_failed(walk),
            ) from error
    comparison.check_edges()
    found = first_difference(steps, walk.steps)
    if found is not None:  # the model may be another since its trace, or what its forward keeps outside of it
        found = first_difference(unsliced(), walk.steps)
    if found is not None:
        step, what = found
        message = f"after slicing, {what} used in {step.place} would change: it follows the width of the model"
        raise VerificationError(message, step.place, step.channels)


def unsliced_steps(model: nn.Module, plan: Plan, norm_groups: NormGroups, calls: Calls) -> list[Step]:
    """What the model computes as it is."""
    channels = Channels.of(model)
    whole = Comparison(channels, plan, sliced_shapes(model, plan, {}), norm_groups)
    try:
        return walk_forward(model, channels, whole, calls).steps
    except TraceError as error:
        raise VerificationError(str(error), "", np.zeros(0, np.int32)) from error


def _failed(walk: Walk) -> tuple[str, np.ndarray, tuple[int, ...]]:
    """The operation that failed, its channels, and the sizes that it was asked for."""
    place, args = walk.failed or (walk.module or "model", ())
    channels = [x.reshape(-1) for t in walk.tensors(args) for x in walk.maps(t)]
    sizes = [n for a in args if isinstance(a, (list, tuple)) for n in a if isinstance(n, int)]
    return place, np.concatenate([np.zeros(0, np.int32), *channels]), tuple(sizes)
