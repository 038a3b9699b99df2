"""Where a model holds its tensors and attributes, and how to give it the shapes of a pruned one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..module_tree import modules_of


def owner_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module and the attribute's name of ``"module.path.attribute"``."""
    module, _, name = path.rpartition(".")
    return model.get_submodule(module), name


def copied(model: nn.Module, memo: Mapping[int, Any] | None = None) -> Any:
    """A deep copy; attributes that hold what the last forward has computed (weight_norm's weights) lose their graph.

    memo: by ``id``, what takes the place of a thing in the copy.
    """
    held = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf]
    return copy.deepcopy(model, {id(v): v.detach().clone() for v in held} | dict(memo or {}))


def tables(model: nn.Module) -> Iterator[tuple[str, dict[str, Any], str, Tensor]]:
    """Every place that holds a parameter or a buffer, tied ones as often as they are held."""
    for prefix, module in modules_of(model).items():
        for table in (module._parameters, module._buffers):
            for key, t in table.items():
                if t is not None:
                    yield (f"{prefix}.{key}".lstrip("."), table, key, t)
