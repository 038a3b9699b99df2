"""What a pruned model is to be: a smaller config of its own class, built on ``meta``."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..architectures.attributes import HEAD_ATTRIBUTES
from ..architectures.configs import build_on_meta, own_config, shapes_of
from ..choices import Units
from ..selection.budgets import BudgetError

CONFIG = "config.json"


@dataclass(frozen=True)
class Target:
    """A config of a model's own class, and the model that it describes.

    updates: what of the model's config changes. fresh: a model of the new config, on ``meta``. units: what has to go of
    the attentions: ``"heads"`` where the config asks for fewer heads, else ``"dims"``.
    """

    updates: Mapping[str, Any]
    fresh: nn.Module
    units: Units

    def __str__(self) -> str:
        return ", ".join(f"{name}={_shown(value)}" for name, value in self.updates.items())


def _shown(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def read_like(model: nn.Module, like: Any) -> dict[str, Any]:
    """What ``like`` changes of a model's config.

    Args:
        model: of a diffusers class.
        like: some keys of a config with their values, a whole config, a model that has one, the path of a
            ``config.json`` or of its folder.

    Raises:
        TypeError: a model without a config, or a ``like`` that is nothing of the above.
        ValueError: a config of another class, keys that the class doesn't have, or nothing that changes.
    """
    if not hasattr(model, "config") or not hasattr(type(model), "from_config"):
        raise TypeError(f"like= is a config of the model's class, and {type(model).__name__} is no model of diffusers")
    own, name = own_config(model), type(model).__name__
    given = _as_mapping(like)
    if given.get("_class_name", name) != name:
        raise ValueError(f"like= is the config of a {given['_class_name']}, the model is a {name}")
    whole = "_class_name" in given
    for key in given:
        if key not in own and not whole:
            near = difflib.get_close_matches(key, own, 1)
            raise ValueError(f"like= has {key!r}, which {name} doesn't take{f': is it {near[0]!r}?' if near else ''}")
    known = {k: v for k, v in given.items() if k in own and not k.startswith("_")}
    # A whole config means what it says; of some keys, the others are free.
    updates = {k: v for k, v in known.items() if _shown(v) != _shown(own[k]) or k == "freq_shift"}
    if updates.keys() <= {"freq_shift"}:
        raise ValueError("like= describes the model as it is: there is nothing to remove")
    return updates


def _as_mapping(like: Any) -> Mapping[str, Any]:
    if isinstance(like, (str, os.PathLike)):
        path = Path(like)
        path = path / CONFIG if path.is_dir() else path
        try:
            like = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"like={str(path)!r}: there is no such file") from None
        except ValueError as e:
            raise ValueError(f"like={str(path)!r} is not JSON ({e})") from None
    elif isinstance(like, nn.Module) and hasattr(like, "config"):
        like = {**own_config(like), "_class_name": type(like).__name__}
    if not isinstance(like, Mapping):
        raise TypeError(f"like= is a config, some of its keys, or the path of one, not {type(like).__name__}")
    return like


def target_of(model: nn.Module, updates: Mapping[str, Any]) -> Target:
    """The model that a config with ``updates`` describes.

    Raises BudgetError where the class can't be built so, or has other parameters than the model.
    """
    said = Target(updates, model, "auto")
    try:
        fresh = build_on_meta(type(model), {**own_config(model), **updates})
    except Exception as e:  # whatever a class makes of a config that it can't take
        raise BudgetError(f"like={said}: {type(model).__name__} can't be built so: {e}") from e
    have, wanted = shapes_of(model), shapes_of(fresh)
    for what, names in (("also has", wanted.keys() - have.keys()), ("lacks", have.keys() - wanted.keys())):
        if names:
            raise BudgetError(
                f"like={said} can't be reached: a {type(model).__name__} of that config {what} {min(names)!r} "
                f"({len(names)} such). Pruning makes layers narrower and adds none: equal widths stay equal where a "
                "shortcut has no convolution, and residual blocks go with drop_blocks, before"
            )
    return Target(updates, fresh, "heads" if _fewer_heads(model, fresh) else "dims")


def _fewer_heads(model: nn.Module, fresh: nn.Module) -> bool:
    theirs = dict(fresh.named_modules())
    return any(
        isinstance(vars(m).get(name), int) and vars(theirs[path]).get(name, vars(m)[name]) < vars(m)[name]
        for path, m in model.named_modules()
        if path in theirs
        for name in HEAD_ATTRIBUTES
    )
