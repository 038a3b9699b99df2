"""What a forward computes, as a list of steps: two models with equal lists compute the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..tracing.channels import Nodes
from ..tracing.graph import Graph
from ..tracing.records import Calls
from ..tracing.tracer import Tracer


def computation(model: nn.Module, calls: Calls, names: Mapping[str, str] | None = None) -> list[Any]:
    """Every operation of a forward on meta with what it works on: parameters by name, activations by their number.

    names: parameters' names to the ones that stand in the list.
    """
    nodes = Nodes.of(model)
    steps = _Steps(model, nodes, names or {})
    steps.run(model, calls)
    return steps.steps


class _Steps(Tracer):
    """A walk that looks at no labels."""

    def __init__(self, model: nn.Module, nodes: Nodes, names: Mapping[str, str]) -> None:
        super().__init__(model, nodes, Graph(nodes.total))
        self.steps: list[Any] = []
        self._names = names
        self._number: dict[int, int] = {}
        self._alive: list[Tensor] = []  # an id is only a name while its tensor lives

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = self._described((args, kwargs or {}))
        out = self.walk.run(func, args, kwargs or {})
        for t in self.walk.tensors(out):
            self._numbered(t)
        self.steps.append((str(func), given))
        return out

    def _numbered(self, t: Tensor) -> int:
        """A new number, also where an operation gives back the tensor that it has changed."""
        self._alive.append(t)
        self._number[id(t)] = len(self._alive)
        return len(self._alive)

    def _described(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            name = self.walk.name_of(tree)
            if name is not None:
                return self._names.get(name, name)
            if id(tree) in self._number:
                return self._number[id(tree)], tuple(tree.shape)
            content = None if tree.is_meta else hashlib.sha256(tree.contiguous().numpy().tobytes()).hexdigest()
            return self._numbered(tree), tuple(tree.shape), str(tree.dtype), content
        if isinstance(tree, dict):
            return {k: self._described(v) for k, v in tree.items()}
        return tuple(self._described(x) for x in tree) if isinstance(tree, (list, tuple)) else tree
