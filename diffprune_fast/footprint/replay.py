"""One operation at any widths, ready to run: which widths its time depends on, and tensors of these sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .recording import Operation
from .widths import Shape

# Their time follows two widths each by itself; that of all others follows the size of what they give.
_CONTRACTIONS = ("aten.conv", "aten.linear", "aten.addmm", "aten.mm", "aten.bmm", "aten.baddbmm")
# All its widths shrink together: heads of queries and values that differ would call other code.
_ATTENTION = "aten.scaled_dot_product_attention"


@dataclass(frozen=True)
class Kind:
    """An operation without its place in the model: calls of the same kind take the same time at the same widths.

    operation: its shapes' ``widths`` are places in ``whole``. whole: the full size of each of its widths. axes: one or
    two tuples of such places; the product of the shares that these keep is what the time depends on. step: sizes that
    suit it are multiples of this.
    """

    operation: Operation
    whole: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    step: int = 1

    @property
    def has_steps(self) -> bool:
        """Whether its time goes in steps of the widths, which are worth measuring one by one."""
        return self.operation.name.startswith((*_CONTRACTIONS, _ATTENTION))

    @property
    def signature(self) -> str:
        """The same for calls of the same kind."""
        return f"{signature(self.operation)} {self.whole} {self.axes}"

    def sizes(self, *shares: float) -> list[int]:
        """All its widths where those of each axis keep this share; further widths follow the first axis."""
        of_axis = {w: i for i, axis in enumerate(self.axes) for w in axis}
        found = []
        for w, n in enumerate(self.whole):
            part = n * shares[of_axis.get(w, 0)]
            found.append(n if part >= n else min(n, max(self.step, round(part / self.step) * self.step)))
        return found

    def place(self, sizes: list[int]) -> tuple[float, ...]:
        """Where on its axes these sizes are: shares of the whole."""
        return tuple([math.prod(sizes[w] / self.whole[w] for w in axis) for axis in self.axes])


def kind_of(operation: Operation, whole: np.ndarray, round_to: int) -> tuple[Kind, tuple[int, ...]]:
    """An operation's kind, and the number of each of its widths. whole: ``(n_widths,)`` full sizes."""
    shapes = [*operation.shapes, operation.out]
    used = sorted({w for s in shapes for w in s.follows}, key=lambda w: (-whole[w], w))
    place = {w: i for i, w in enumerate(used)}
    axes: tuple[tuple[int, ...], ...]
    if operation.name.startswith(_CONTRACTIONS) and len(used) <= 2:
        axes = tuple([(i,) for i in range(len(used))])
    elif operation.name.startswith(_ATTENTION):
        axes = (tuple(range(len(used))),)
    else:
        follows = operation.out.follows or next(s.follows for s in shapes if s.follows)
        axes = (tuple([place[w] for w in dict.fromkeys(follows)]),)
    step = round_to
    if "group_norm" in operation.name and isinstance(operation.args[1], int):
        step = math.lcm(round_to, operation.args[1])
    numbered = each_shape(lambda s: replace(s, widths=tuple([place.get(w, -1) for w in s.widths])), operation)
    return Kind(numbered, tuple([int(whole[w]) for w in used]), axes, step), tuple(used)


def each_shape(f: Callable[[Shape], Any], operation: Operation) -> Operation:
    args, kwargs, out = tree_map(
        lambda x: f(x) if isinstance(x, Shape) else x, (operation.args, dict(operation.kwargs), operation.out)
    )
    return Operation(operation.function, args, kwargs, out)


def sized(operation: Operation, sizes: Sequence[int]) -> Operation:
    """An operation with these sizes for its widths."""

    def made(x: Shape) -> Shape:
        now = tuple([sizes[w] if w >= 0 else n for n, w in zip(x.sizes, x.widths)])
        return replace(x, sizes=now, widths=(-1,) * len(now))

    return each_shape(made, operation)


def signature(operation: Operation) -> str:
    """What an operation of given sizes is, in words: those with the same take the same time."""

    def told(x: Any) -> str:
        if isinstance(x, Shape):
            order = "" if x.order == tuple(range(len(x.order))) else f"@{','.join(map(str, x.order))}"
            sizes = "x".join([f"{n}" if w < 0 else f"{n}:{w}" for n, w in zip(x.sizes, x.widths)])
            return f"{x.dtype}[{sizes}]{order}"
        if isinstance(x, (list, tuple)):
            return f"[{', '.join(map(told, x))}]"
        return str(x)

    named = [f"{name}={told(x)}" for name, x in operation.kwargs.items() if not isinstance(x, torch.device)]
    return f"{operation.name}({', '.join([*map(told, operation.args), *named])})"


def ready(operation: Operation, device: torch.device) -> Callable[[], Any]:
    """A call of an operation of given sizes, with tensors of numbers that mean nothing."""

    def made(x: Any) -> Any:
        if isinstance(x, torch.device):
            return device
        return tensor(x, device) if isinstance(x, Shape) else x

    args, kwargs = tree_map(made, (operation.args, dict(operation.kwargs)))
    return lambda: operation.function(*args, **kwargs)


def tensor(shape: Shape, device: torch.device) -> Tensor:
    """A tensor as it lies in memory: of a small number, or of the first index."""
    dtype = getattr(torch, shape.dtype)
    sizes = [shape.sizes[d] for d in shape.order]
    values = torch.full(sizes, 0.01 if dtype.is_floating_point else 0, dtype=dtype, device=device)
    return values.permute([shape.order.index(d) for d in range(len(sizes))])
