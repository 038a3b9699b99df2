"""What a model was before it was pruned: noted on the module, kept in checkpoints, compared when one is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .manifest import CheckpointError
from .plain_config import is_settable, shapes_of
from .tracing import Plan

_NOTE = "_diffprune_unpruned"  # on the module, as copies and pickles take it along

# Numbers that a plan doesn't count where only dims go, and which no shape tells.
_COUNTS = frozenset({"heads", "num_heads", "n_heads", "num_attention_heads", "num_groups", "groups"})


def noted(model: nn.Module) -> dict[str, Any]:
    """``shapes`` (name to sizes) and ``attributes`` (path to value) of ``model`` before its first pruning, if known."""
    return vars(model).get(_NOTE, {"shapes": {}, "attributes": {}})


def note(model: nn.Module, before: Mapping[str, Any]) -> None:
    """Keep on a pruned module what :func:`before_pruning` said of it, or the manifest that it was loaded from."""
    setattr(model, _NOTE, before)


def before_pruning(model: nn.Module, plan: Plan) -> dict[str, Any]:
    """What there is to note of a model that is about to be pruned by ``plan``; if it was before, of that time."""
    modules = dict(model.named_modules())
    counted = {(a.module, a.name) for a in plan.attributes}
    counted |= {(path, name) for path, m in modules.items() for name in _COUNTS & vars(m).keys()}
    now = {f"{path}.{name}".lstrip("."): getattr(modules[path], name, None) for path, name in sorted(counted)}
    attributes = {path: value for path, value in now.items() if is_settable(value)}
    earlier = noted(model)
    return {
        "shapes": {**plan.shapes, **earlier["shapes"]},
        "attributes": {**attributes, **earlier["attributes"]},
    }


def changed_since(model: nn.Module) -> dict[str, Any]:
    """The noted attributes that pruning has changed, with the values that they have now."""
    modules, changed = dict(model.named_modules()), {}
    for path, before in noted(model)["attributes"].items():
        owner, _, name = path.rpartition(".")
        now = getattr(modules.get(owner), name, None)
        if is_settable(now) and now != _value(before):
            changed[path] = now
    return changed


def check_unpruned(model: nn.Module, before: Mapping[str, Any]) -> None:
    """Raises CheckpointError where ``model`` isn't what the pruned one was; names that it lacks are not looked at."""
    modules, shapes = dict(model.named_modules()), shapes_of(model)
    of_instance: dict[str, Any] = {}
    for path in before["attributes"]:
        owner, _, name = path.rpartition(".")
        if owner in modules and name in vars(modules[owner]):
            of_instance[path] = vars(modules[owner])[name]
    for name, was in [*before["shapes"].items(), *before["attributes"].items()]:
        found = shapes.get(name, of_instance.get(name))
        if found is not None and found != _value(was):
            raise CheckpointError(
                f"the given {type(model).__name__} is not the model that was pruned: its {name} is {found}, it was "
                f"{_value(was)}. Give an instance of the unpruned architecture"
            )


def _value(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
