"""Where a model holds its tensors and attributes, and how to give it the shapes of a pruned one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def owner_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module and the attribute's name of ``"module.path.attribute"``."""
    module, _, name = path.rpartition(".")
    return model.get_submodule(module), name


def tables(model: nn.Module) -> Iterator[tuple[str, dict[str, Any], str, Tensor]]:
    """Every place that holds a parameter or a buffer, tied ones as often as they are held."""
    for prefix, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for key, t in table.items():
                if t is not None:
                    yield (f"{prefix}.{key}".lstrip("."), table, key, t)
