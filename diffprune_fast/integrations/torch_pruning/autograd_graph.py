"""The autograd graph of Torch-Pruning's trace holds every parameter as it was; all that is read of it is numbers.

While it lives, no parameter can be sliced within its own memory, and the memory of none is given back.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


class SavedNumbers:
    """In place of an autograd node: its name, and what it has saved besides tensors (sizes, dims)."""

    next_functions = ()

    def __init__(self, grad_fn: Any) -> None:
        self._name = grad_fn.name()
        for name in [n for n in dir(grad_fn) if n.startswith("_saved_")]:
            try:
                value = getattr(grad_fn, name)
            except RuntimeError:  # tensors that backward() has freed
                continue
            held = value if isinstance(value, (tuple, list)) else (value,)
            if not any(isinstance(x, Tensor) for x in held):
                setattr(self, name, value)

    def name(self) -> str:
        return self._name


def let_go(graph: Any) -> None:
    """Keep of a dependency graph's autograd graph what Torch-Pruning reads of it."""
    for node in graph.module2node.values():
        if hasattr(node.grad_fn, "name") and not isinstance(node.grad_fn, SavedNumbers):
            node.grad_fn = SavedNumbers(node.grad_fn)
        if hasattr(node.module, "grad_fn") and not isinstance(node.module, Tensor):
            node.module.grad_fn = node.grad_fn
