"""Which rule stands for which aten op, and what rules are made with.

A rule gets the :class:`Operation`, its first argument, and as keywords those of the other arguments that the rule's
signature names as the operation's schema does; it returns the output. To support an op, write a rule (or reuse one)
and name the op. An op without a rule is decomposed if PyTorch can, else it freezes all it touches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..labels import LabelMaps
from ..walk import Walk


@dataclass(slots=True)
class Operation:
    """One operation of a forward, as a rule gets it: not yet run."""

    walk: Walk
    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.func.overloadpacket.__name__

    @property
    def place(self) -> str:
        return self.walk.place(self.func)

    def run(self) -> Any:
        """The operation itself, on meta where any operand is there; it raises PyTorch's own errors."""
        return self.walk.run(self.func, self.args, self.kwargs)

    def run_unknown(self) -> Any:
        """Run it as one without a rule: everything that it reads or writes stays."""
        out = self.run()
        self.freeze_operands()
        return out

    def freeze_operands(self) -> None:
        for t in self.walk.tensors((self.args, self.kwargs)):
            for label_map in self.walk.maps(t):
                self.walk.graph.freeze(label_map, f"no rule for {self.func.overloadpacket} ({self.place})")
            if self.func._schema.is_mutable:
                self.walk.label(t, None)


class Rule(NamedTuple):
    """A rule's function. of_first: it also gets the first argument's labels and the output, see rule_of_first."""

    function: Callable[..., Any]
    of_first: bool


RULES: dict[str, Rule] = {}


def rule(*names: str, of_first: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a rule for operations of aten. Raises ValueError for one that has a rule."""

    def register(f: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            if f"aten::{name}" in RULES:
                raise ValueError(f"aten::{name} has a rule already, {RULES[f'aten::{name}'].function.__name__}")
            RULES[f"aten::{name}"] = Rule(f, of_first)
        _bound.cache_clear()
        return f

    return register


def rule_of_first(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A rule about the first argument, for when it has labels: it gets these and the operation's output as well."""
    return rule(*names, of_first=True)


@cache
def _bound(func: Any) -> tuple[Rule, tuple[str, ...], frozenset[str]] | None:
    """An operation's rule, the names of its arguments after the first, and those that the rule asks for."""
    found = RULES.get(func._schema.name)
    if found is None:
        return None
    return found, tuple([a.name for a in func._schema.arguments[1:]]), frozenset(inspect.signature(found[0]).parameters)


def has_rule(func: Any) -> bool:
    return _bound(func) is not None


def apply_rule(walk: Walk, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Any:
    """Run an operation by its rule, of which there must be one."""
    bound = _bound(func)
    assert bound is not None
    (function, of_first), names, asked = bound
    named = {n: a for n, a in zip(names, args[1:]) if n in asked}
    if kwargs:
        named.update({n: a for n, a in kwargs.items() if n in asked})
    op = Operation(walk, func, args, kwargs or {})
    if not of_first:
        return function(op, args[0], **named)
    out = op.run()
    labels = walk.labels(args[0])
    if labels is not None:
        return function(op, args[0], labels, out, **named)
    op.freeze_operands()
    return out


def empty_output(shape: Sequence[int], like: Tensor) -> Tensor:
    """An output that has a shape and no data: PyTorch's own meta kernels cost more than all our arithmetic."""
    return torch.empty(shape, dtype=like.dtype, device="meta")


def each(out: Any) -> Sequence[Any]:
    """The outputs of an operation that may have several."""
    return out if isinstance(out, (tuple, list)) else (out,)


def align(maps: LabelMaps, ndim: int) -> LabelMaps:
    """Label maps with size-1 dims in front, as broadcasting has it."""
    return tuple([x if x.ndim == ndim else x.reshape((1,) * (ndim - x.ndim) + x.shape) for x in maps])


def pad_shape(shape: Sequence[int], ndim: int) -> tuple[int, ...]:
    return (1,) * (ndim - len(shape)) + tuple(shape)


def dims_of(value: Any, ndim: int) -> list[int]:
    if value is None or value == []:
        return list(range(ndim))
    return [d % ndim for d in (value if isinstance(value, (list, tuple)) else [value])]
