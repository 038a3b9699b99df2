"""What a pruned module carries: what it was before, how it was pruned; kept in checkpoints, compared on loading."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..module_tree import modules_of
from ..plan.plan import Plan

_NOTE = "_diffprune_record"  # on the module, as copies and pickles take it along

# Numbers that a plan doesn't count where only dims go, and which no shape tells.
_COUNTS = frozenset({"heads", "num_heads", "n_heads", "num_attention_heads", "num_groups", "groups"})


@dataclass(frozen=True)
class Record:
    """What a pruned module carries with it.

    shapes, attributes: name to sizes, and path to value, of the model before its first pruning. about: how it was
    pruned, as plain JSON values: what its checkpoint's manifest says.
    """

    shapes: Mapping[str, Any] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)


def record_of(model: nn.Module) -> Record:
    """The record of a pruned module; an empty one for a module that was never pruned."""
    return vars(model).get(_NOTE, Record())


def attach_record(model: nn.Module, record: Record) -> None:
    """Hang a record on a module, in place of the one that it has."""
    setattr(model, _NOTE, record)


def before_pruning(model: nn.Module, plan: Plan) -> Record:
    """The record of a model that is about to be pruned by ``plan``; if it was before, shapes and attributes of then."""
    modules = modules_of(model)
    counted = {(a.module, a.name) for a in plan.attributes}
    counted |= {(path, name) for path, m in modules.items() for name in _COUNTS & vars(m).keys()}
    now = {f"{path}.{name}".lstrip("."): getattr(modules[path], name, None) for path, name in sorted(counted)}
    attributes = {path: value for path, value in now.items() if is_settable(value)}
    earlier = record_of(model)
    return Record({**plan.shapes, **earlier.shapes}, {**attributes, **earlier.attributes})


def changed_since(model: nn.Module) -> dict[str, Any]:
    """The recorded attributes that pruning has changed, with the values that they have now."""
    modules, changed = modules_of(model), {}
    for path, before in record_of(model).attributes.items():
        owner, _, name = path.rpartition(".")
        now = getattr(modules.get(owner), name, None)
        if is_settable(now) and now != from_json(before):
            changed[path] = now
    return changed


def from_json(value: Any) -> Any:
    """An attribute's value as it was before it became JSON: a list was a tuple."""
    return tuple(value) if isinstance(value, list) else value


def is_settable(value: Any) -> bool:
    """Whether ``value`` is what a module attribute that follows a width may be: counts, and a softmax scale."""
    if isinstance(value, tuple):
        return all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
