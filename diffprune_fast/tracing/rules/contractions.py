"""Rules of contractions: operands meet in one index space, then the contracted dim is summed away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..labels import Labels, Layer, Layers, varying
from ..scale_folding import of_projection
from .registry import aligned, padded, rule, shell, unknown

if TYPE_CHECKING:
    from ..walk import Walk


def contract(
    walk: Walk, func: Any, a: Layers, sa: Sequence[int], b: Layers, sb: Sequence[int], attention: bool = False
) -> tuple[Layers, tuple[Layer, ...]]:
    """Meet in a space whose last dim is contracted; the layers that are left, and those that were contracted."""
    last = len(sa) - 1
    joined = walk.graph.meet(a, sa, b, sb, walk.place(func), summed=(last,))
    total = int(np.prod([max(m, n) for m, n in zip(sa, sb)], dtype=np.int64))
    walk.cost(func, total, joined, attention)
    left = tuple([x.reshape(x.shape[:-1]) for x in joined if x.shape[-1] == 1])
    return left, tuple([x for x in joined if x.shape[-1] > 1])


def _insert(layers: Layers, axis: int) -> Layers:
    return tuple([np.expand_dims(x, axis) for x in layers])


def _layers(walk: Walk, t: Tensor) -> Layers:
    labels = walk.labels(t)
    return labels.layers if labels is not None else ()


def add_bias(walk: Walk, func: Any, layers: Layers, shape: Sequence[int], bias: Tensor | None, axis: int) -> Layers:
    """Join a 1-D parameter with the dim ``axis`` of an output."""
    if bias is None:
        return layers
    view = [1] * len(shape)
    view[axis] = bias.shape[0]
    mine = tuple([x.reshape(view) for x in _layers(walk, bias)])
    if not mine and not layers:
        return layers
    return walk.graph.meet(layers, shape, mine, view, walk.place(func))


@rule("linear")
def linear(walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, w = args[0], args[1]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    if w.dim() != 2:
        return unknown(walk, func, args, kwargs)
    if x.shape[-1] != w.shape[1] or (bias is not None and bias.shape[0] != w.shape[0]):
        return walk.run(func, args, kwargs)  # raises PyTorch's own error
    out = shell((*x.shape[:-1], w.shape[0]), x)
    ndim = x.dim() + 1
    sx, sw = (*x.shape[:-1], 1, x.shape[-1]), padded(w.shape, ndim)
    left, summed = contract(walk, func, _insert(_layers(walk, x), -2), sx, aligned(_layers(walk, w), ndim), sw)
    left = add_bias(walk, func, left, out.shape, bias, -1)
    walk.attribute(w, "in_features", *[y for y in summed if varying(y) == (ndim - 1,)])
    walk.attribute(w, "out_features", *[y for y in left if varying(y) == (out.dim() - 1,)])
    walk.label(out, Labels(left, of_projection(walk, w, bias)))
    return out


@rule("mm", "bmm", "addmm", "baddbmm")
def matrix_product(walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    bias = args[0] if name in ("addmm", "baddbmm") and kwargs.get("beta", 1) != 0 else None
    a, b = args[1:3] if name in ("addmm", "baddbmm") else args[:2]
    if a.shape[-1] != b.shape[-2] or a.shape[:-2] != b.shape[:-2]:
        return walk.run(func, args, kwargs)  # raises PyTorch's own error
    out = shell((*a.shape[:-1], b.shape[-1]), a)
    la, lb = _insert(_layers(walk, a), -2), _insert(_layers(walk, b), -3)
    lb = tuple([np.swapaxes(x, -1, -2) for x in lb])
    sa, sb = (*a.shape[:-1], 1, a.shape[-1]), (*b.shape[:-2], 1, b.shape[-1], b.shape[-2])
    weights = walk.name_of(a) is not None or walk.name_of(b) is not None
    if not weights:
        walk.attend(a, b)
    left, _ = contract(walk, func, la, sa, lb, sb, attention=not weights)
    if bias is not None:
        mine = aligned(_layers(walk, bias), out.dim())
        if mine or left:
            left = walk.graph.meet(left, out.shape, mine, padded(bias.shape, out.dim()), walk.place(func))
    walk.label(out, Labels(left))
    return out
