"""Where a model holds its tensors and attributes, and how to give it the shapes of a pruned one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
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


def apply_shapes(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], attributes: Mapping[str, int | tuple[int, ...]]
) -> None:
    """Give a model on the meta device the shapes and attributes of a pruned one, for loading its weights.

    Raises:
        KeyError: a parameter or attribute that the model doesn't have.
    """
    first: dict[int, Tensor] = {}
    missing = set(shapes)
    for name, table, key, t in list(tables(model)):
        if id(t) in first:
            table[key] = first[id(t)]
        elif name in shapes:
            new: Tensor = torch.empty(shapes[name], dtype=t.dtype, device="meta")
            table[key] = nn.Parameter(new, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else new
            first[id(t)] = table[key]
            missing.discard(name)
    if missing:
        raise KeyError(f"{type(model).__name__} has no parameter {sorted(missing)[0]!r}")
    for path, value in attributes.items():
        module, name = owner_of(model, path)
        if not hasattr(module, name):
            raise KeyError(f"{type(model).__name__} has no attribute {path!r}")
        setattr(module, name, value)
