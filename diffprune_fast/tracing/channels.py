"""Every channel of a model has a number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from ..module_tree import buffers_of, parameters_of
from ..plan.plan import Plan
from .labels import LabelMaps


@dataclass
class Channels:
    """A number for every channel, its id: those of ``(parameter, dim)`` are ``start[(parameter, dim)] + index``.

    0 is no channel: it stands for what always stays. names: a tensor's ``id()`` to its name. shapes: by name. buffers:
    the names that are buffers'. total: how many ids there are, 0 included.
    """

    names: dict[int, str]
    shapes: dict[str, tuple[int, ...]]
    buffers: frozenset[str]
    start: dict[tuple[str, int], int] = field(default_factory=dict)
    total: int = 1

    @classmethod
    def of(cls, model: nn.Module) -> Channels:
        """All parameters and floating-point buffers, tied ones once, by their first name."""
        names: dict[int, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, p in parameters_of(model).items():
            names[id(p)] = name
            shapes[name] = tuple(p.shape)
        buffers = set()
        for name, b in buffers_of(model).items():
            if b.is_floating_point():
                names[id(b)] = name
                shapes[name] = tuple(b.shape)
                buffers.add(name)
        channels = cls(names, shapes, frozenset(buffers))
        for name, shape in shapes.items():
            for dim, n in enumerate(shape):
                if n > 1:
                    channels.start[name, dim] = channels.total
                    channels.total += n
        return channels

    def maps(self, name: str, kept: Mapping[tuple[str, int], np.ndarray] | None = None) -> LabelMaps:
        """One label map per dim of a parameter; ``kept``: the indices that a sliced parameter still has."""
        shape = self.shapes[name]
        maps = []
        for dim, n in enumerate(shape):
            if n > 1:
                start, index = self.start[name, dim], kept.get((name, dim)) if kept is not None else None
                ids = np.arange(start, start + n, dtype=np.int32) if index is None else (index + start).astype(np.int32)
                if ids.size > 1:
                    maps.append(ids.reshape((1,) * dim + (-1,) + (1,) * (len(shape) - dim - 1)))
        return tuple(maps)


def units_of_channels(plan: Plan, channels: Channels) -> np.ndarray:
    """``(n_channels,)``: the plan-wide unit of every channel, -1 for those that stay."""
    unit_of = np.full(channels.total, -1, np.int64)
    for g, group in enumerate(plan.groups):
        units = plan.offsets[g] + np.arange(group.n_units)[:, None]
        for m in group.members:
            unit_of[channels.start[m.parameter, m.dim] + m.index] = units
    return unit_of
