"""Every channel of a model has a number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from ..plan.plan import Plan
from .labels import Layers


@dataclass
class Nodes:
    """Numbers every channel: node ids of ``(parameter, dim)`` are ``start[(parameter, dim)] + index``; 0 is frozen."""

    names: dict[int, str]
    shapes: dict[str, tuple[int, ...]]
    buffers: frozenset[str]
    start: dict[tuple[str, int], int] = field(default_factory=dict)
    total: int = 1

    @classmethod
    def of(cls, model: nn.Module) -> Nodes:
        """All parameters and floating-point buffers, tied ones once, by their first name."""
        names: dict[int, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, p in model.named_parameters():
            names[id(p)] = name
            shapes[name] = tuple(p.shape)
        buffers = set()
        for name, b in model.named_buffers():
            if b.is_floating_point():
                names[id(b)] = name
                shapes[name] = tuple(b.shape)
                buffers.add(name)
        nodes = cls(names, shapes, frozenset(buffers))
        for name, shape in shapes.items():
            for dim, n in enumerate(shape):
                if n > 1:
                    nodes.start[name, dim] = nodes.total
                    nodes.total += n
        return nodes

    def layers(self, name: str, kept: Mapping[tuple[str, int], np.ndarray] | None = None) -> Layers:
        """One layer per dim of a parameter; ``kept``: the indices that a sliced parameter still has."""
        shape = self.shapes[name]
        layers = []
        for dim, n in enumerate(shape):
            if n > 1:
                index = np.arange(n, dtype=np.int32) if kept is None or (name, dim) not in kept else kept[name, dim]
                view = [1] * len(shape)
                view[dim] = -1
                if index.size > 1:
                    layers.append((self.start[name, dim] + index).astype(np.int32).reshape(view))
        return tuple(layers)


def units_of_nodes(plan: Plan, nodes: Nodes) -> np.ndarray:
    """``(n_nodes,)``: the plan-wide unit of every channel, -1 for those that stay."""
    unit_of = np.full(nodes.total, -1, np.int64)
    for g, group in enumerate(plan.groups):
        for m in group.members:
            unit_of[nodes.start[m.parameter, m.dim] + m.index] = plan.offsets[g] + np.arange(group.n_units)[:, None]
    return unit_of
