"""A keep-set worked out: which indices of which parameter stay, and what the attributes become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from ..module_tree import modules_of
from .plan import Plan


@dataclass(frozen=True)
class Sliced:
    """A keep-set worked out.

    keep: group name to the units that stay. kept: ``(parameter, dim)`` to the sorted indices that stay, for the places
    that lose any. shapes: all parameters and floating-point buffers afterwards. attributes:
    ``"module.path.attribute"`` to its new value.
    """

    keep: dict[str, np.ndarray]
    kept: dict[tuple[str, int], np.ndarray]
    shapes: dict[str, tuple[int, ...]]
    attributes: dict[str, int | float | tuple[int, ...]]


def sliced_shapes(model: nn.Module, plan: Plan, keep: Mapping[str, np.ndarray]) -> Sliced:
    """Work out which indices of which parameter stay, and what the attributes become."""
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
    alike: dict[bytes, np.ndarray] = {}  # one array for all places that keep the same
    kept = {place: alike.setdefault(mask.tobytes(), np.flatnonzero(mask)) for place, mask in masks.items()}
    shapes = dict(plan.shapes)
    for (name, dim), index in kept.items():
        shape = list(shapes[name])
        shape[dim] = index.size
        shapes[name] = tuple(shape)
    before, after = plan.extents.at(plan.counts()), plan.extents.at(plan.counts(keep))
    modules = modules_of(model)
    attributes: dict[str, int | float | tuple[int, ...]] = {}
    for a in plan.attributes:
        if before[a.extent] != after[a.extent]:
            old, new = getattr(modules[a.module], a.name), round(float(after[a.extent]))
            value = float(new**a.power) if a.power != 1 else (*old[:-1], new) if isinstance(old, tuple) else new
            attributes[f"{a.module}.{a.name}".lstrip(".")] = value
    return Sliced(dict(keep), kept, shapes, attributes)


def alive_units(plan: Plan, keep: Mapping[str, np.ndarray]) -> np.ndarray:
    """``(n_units + 1,)`` bool: which units stay; the last entry answers for unit -1, what always stays."""
    alive = np.zeros(plan.n_units + 1, bool)
    alive[-1] = True
    for g, group in enumerate(plan.groups):
        units = keep.get(group.name)
        alive[plan.offsets[g] + (np.arange(group.n_units) if units is None else units)] = True
    return alive
