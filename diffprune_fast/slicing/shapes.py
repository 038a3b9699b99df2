"""What a keep-set means for every parameter and attribute: indices that stay, new shapes, new values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..tracing import Plan


@dataclass(frozen=True)
class Sliced:
    """A keep-set worked out.

    kept: ``(parameter, dim)`` to the sorted indices that stay, for the places that lose any. shapes: all parameters
    and floating-point buffers afterwards. attributes: ``"module.path.attribute"`` to its new value.
    """

    keep: dict[str, np.ndarray]
    kept: dict[tuple[str, int], np.ndarray]
    shapes: dict[str, tuple[int, ...]]
    attributes: dict[str, int | tuple[int, ...]]


def sliced_shapes(model: nn.Module, plan: Plan, keep: Mapping[str, np.ndarray]) -> Sliced:
    """Work out which indices of which parameter stay."""
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
    counts = plan.counts(keep)
    before, after = plan.extents.at(plan.counts()), plan.extents.at(counts)
    attributes: dict[str, int | tuple[int, ...]] = {}
    for a in plan.attributes:
        if before[a.extent] != after[a.extent]:
            old = getattr(model.get_submodule(a.module), a.name)
            new = int(after[a.extent])
            attributes[f"{a.module}.{a.name}".lstrip(".")] = (*old[:-1], new) if isinstance(old, tuple) else new
    return Sliced(dict(keep), kept, shapes, attributes)


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
