"""Which rule stands for which aten op, and what rules are made with.

A rule gets ``(walk, func, args, kwargs)`` and returns the op's output. To support an op, write a rule (or reuse one)
and name the op. An op without a rule is decomposed if PyTorch can, else it freezes all it touches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..labels import Layers

if TYPE_CHECKING:
    from ..walk import Walk


Rule = Callable[["Walk", Any, tuple[Any, ...], dict[str, Any]], Any]


RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(f: Rule) -> Rule:
        RULES.update({f"aten::{n}": f for n in names})
        return f

    return register


def rule_of_first(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A rule about the first operand: it also gets the op's output and that operand's labels, if there are any."""

    def register(f: Callable[..., Any]) -> Callable[..., Any]:
        def run(walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            out = walk.run(func, args, kwargs)
            labels = walk.labels(args[0])
            if labels is not None:
                return f(walk, func, args, kwargs, out, labels)
            others = any(walk.labels(t) is not None for t in walk.tensors((args[1:], kwargs)))
            return unknown(walk, func, args, kwargs) if others else out

        rule(*names)(run)
        return f

    return register


def shell(shape: Sequence[int], like: Tensor) -> Tensor:
    """An output that has a shape and no data: PyTorch's own meta kernels cost more than all our arithmetic."""
    return torch.empty(shape, dtype=like.dtype, device="meta")


def aligned(layers: Layers, ndim: int) -> Layers:
    """Layers with size-1 dims in front, as broadcasting has it."""
    return tuple([x if x.ndim == ndim else x.reshape((1,) * (ndim - x.ndim) + x.shape) for x in layers])


def padded(shape: Sequence[int], ndim: int) -> tuple[int, ...]:
    return (1,) * (ndim - len(shape)) + tuple(shape)


def dims_of(value: Any, ndim: int) -> list[int]:
    if value is None or value == []:
        return list(range(ndim))
    return [d % ndim for d in (value if isinstance(value, (list, tuple)) else [value])]


def unknown(walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """No rule: everything that the op reads or writes stays."""
    out = walk.run(func, args, kwargs)
    for t in walk.tensors((args, kwargs)):
        labels = walk.labels(t)
        for layer in labels.layers if labels is not None else ():
            walk.graph.freeze(layer, f"no rule for {func.overloadpacket} ({walk.place(func)})")
        if labels is not None and func._schema.is_mutable:
            walk.label(t, None)
    return out
