"""What a traced model computes, kept while its plan lives: a sliced model of it is compared without another walk."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..plan.plan import Plan
from .meta import inputs_on_meta
from .records import Calls, Step


@dataclass(frozen=True)
class _Kept:
    """The steps of one model in these calls. plan, model: weak references."""

    plan: weakref.ref[Plan]
    model: weakref.ref[nn.Module]
    calls: Calls
    steps: Sequence[Step]


_KEPT: dict[int, _Kept] = {}  # by the plan's id; equal plans may be of different models


def keep_steps(plan: Plan, model: nn.Module, calls: Calls, steps: Sequence[Step]) -> None:
    """Keep what the model computes in the calls as long as the plan lives."""
    key = id(plan)
    shapes = inputs_on_meta(list(calls))  # the user's activations aren't kept
    _KEPT[key] = _Kept(weakref.ref(plan, lambda _: _KEPT.pop(key, None)), weakref.ref(model), shapes, steps)


def kept_steps(plan: Plan, model: nn.Module, calls: Calls) -> Sequence[Step] | None:
    """What the model computes in the calls, if it was traced with such calls; whether it still does isn't known."""
    found = _KEPT.get(id(plan))
    if found is None or found.plan() is not plan or found.model() is not model or not _alike(found.calls, calls):
        return None
    return found.steps


def _alike(a: Calls, b: Calls) -> bool:
    """Whether walks of the calls see the same: shapes of activations, values of ids, masks and numbers."""
    (mine, tree), (theirs, other) = tree_flatten(list(a)), tree_flatten(list(b))
    return tree == other and all(_same(x, y) for x, y in zip(mine, theirs))


def _same(x: Any, y: Any) -> bool:
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return x is y or (type(x) is type(y) and isinstance(x, (bool, int, float, str)) and x == y)
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    return x is y or x.is_floating_point() or (x.device == y.device and not x.is_meta and torch.equal(x, y))
