"""Rules of contractions: operands meet in one index space, then the contracted dim is summed away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .constants import is_diagonal
from .labels import Labels, Layer, Layers, varying
from .movement import repeated
from .rules import aligned, padded, rule, shell, unknown
from .scales import fix, of_projection

if TYPE_CHECKING:
    from .walk import Walk


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


def _channels(walk: Walk, func: Any, x: Tensor, n_spatial: int) -> tuple[Layer | None, Layer | None]:
    """The labels along a convolution's input channels, ``(C,)``, and its batch, ``(N,)``; labels elsewhere stay."""
    found = batch = None
    batched = x.dim() == n_spatial + 2
    for layer in _layers(walk, x):
        dims = varying(layer)
        if dims == (1 if batched else 0,):
            found = layer.reshape(-1)
        elif batched and dims == (0,):
            batch = layer.reshape(-1)
        elif batched and 1 in dims and all(layer.shape[d] == 1 for d in range(2, layer.ndim)):
            found = layer.reshape(layer.shape[0], -1)[0]
            walk.graph.tie(layer, (0,), walk.place(func))
        else:
            walk.graph.freeze(layer, f"is a spatial position of {walk.place(func)}")
    return found, batch


def _weight_dims(walk: Walk, w: Tensor) -> tuple[Layer | None, Layer | None]:
    """A weight's labels along dims 0 and 1; along kernel dims nothing can be removed."""
    found: list[Layer | None] = [None, None]
    for layer in _layers(walk, w):
        dims = varying(layer)
        if dims in ((0,), (1,)):
            found[dims[0]] = layer.reshape(-1)
        elif any(d < 2 for d in dims):
            walk.graph.freeze(layer, "is a channel and kernel position at once")
    return found[0], found[1]


def _join(walk: Walk, func: Any, x: Layer | None, w: Layer | None) -> None:
    """Input channels meet the weight's."""
    if x is not None and w is not None:
        walk.graph.link(x, w, walk.place(func))
    elif x is not None or w is not None:
        walk.graph.freeze(x if w is None else w, f"meets an unlabelled dimension in {walk.place(func)}")  # type: ignore[arg-type]


def _tiled(layer: Layer | None, size: int, groups: int) -> Layer | None:
    return None if layer is None else np.broadcast_to(layer.reshape(1, -1), (groups, size)).reshape(-1)


def _grouped(
    walk: Walk, func: Any, x: Layer | None, w: Tensor, groups: int, transposed: bool
) -> tuple[Layer | None, Layer | None, bool]:
    """Join a convolution's input; the labels of its input and output channels, and whether it is depthwise."""
    if is_diagonal(w) and groups == 1:
        return x, x, False
    rows, cols = _weight_dims(walk, w)
    place = walk.place(func)
    n0, n1 = w.shape[0], w.shape[1]
    if groups == 1:
        _join(walk, func, x, rows if transposed else cols)
        return x, cols if transposed else rows, False
    depthwise = (n0 if transposed else n1 * groups) == groups
    if depthwise and not transposed:
        if rows is not None:
            _join(walk, func, None if x is None else np.repeat(x, n0 // groups), rows)
        elif x is not None:
            walk.graph.freeze(x, f"meets an unlabelled dimension in {place}")
        return x, rows, True
    if depthwise:
        _join(walk, func, x, rows)
        if n1 == 1:
            return x, rows, True
        if rows is not None and cols is not None:
            walk.graph.freeze(rows, f"is a group of {place}")
        return x, _tiled(cols, n1, groups), False
    if transposed:
        if rows is not None:
            walk.graph.constrain("conv_groups", place, rows.reshape(groups, -1))
        _join(walk, func, x, rows)
        return x, _tiled(cols, n1, groups), False
    if rows is not None:
        walk.graph.constrain("conv_groups", place, rows.reshape(groups, -1))
    _join(walk, func, x, _tiled(cols, n1, groups))
    return x, rows, False


@rule("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    named = {**dict(zip([a.name for a in func._schema.arguments], args)), **kwargs}
    x, w, bias = named["input"], named["weight"], named.get("bias")
    groups = named.get("groups", 1)
    name = func.overloadpacket.__name__
    transposed = named.get("transposed", False) or "transpose" in name
    out = _conv_shell(walk, func, args, kwargs, named, transposed)
    n_spatial = w.dim() - 2
    channels, batch = _channels(walk, func, x, n_spatial)
    cin, cout, depthwise = _grouped(walk, func, channels, w, groups, transposed)
    axis = out.dim() - n_spatial - 1
    layers: Layers = ()
    if batch is not None:  # resamplers put channels there, one by one through a kernel
        layers = (batch.reshape(-1, *(1,) * (out.dim() - 1)),)
    if cout is not None and cout.size > 1:
        view = [1] * out.dim()
        view[axis] = -1
        layers = (*layers, cout.reshape(view))
    layers = add_bias(walk, func, layers, out.shape, bias, axis)
    pixels = int(np.prod(x.shape[-n_spatial:] if transposed else out.shape[-n_spatial:], dtype=np.int64))
    macs = (out.shape[0] if axis else 1) * pixels * w.numel()
    rows, cols = (cin, cout) if is_diagonal(w) else _weight_dims(walk, w)
    walk.cost(func, macs, tuple([y for y in (rows, cols, batch) if y is not None]))
    if cin is not None:
        walk.attribute(w, "in_channels", cin)
        if depthwise:
            walk.attribute(w, "groups", cin)
    if cout is not None:
        walk.attribute(w, "out_channels", cout)
    walk.label(out, Labels(layers, of_projection(walk, w, bias) if not transposed else None))
    return out


def _conv_shell(walk: Walk, func: Any, args: Any, kwargs: Any, named: dict[str, Any], transposed: bool) -> Tensor:
    """The output's shape by formula for the common case (PyTorch's meta kernel is a slow decomposition)."""
    x, w = named["input"], named["weight"]
    padding = named.get("padding", 0)
    n = w.dim() - 2
    if transposed or isinstance(padding, str) or x.dim() != n + 2 or x.device.type != "meta":
        return walk.run(func, args, kwargs)

    def per_dim(v: Any) -> list[int]:
        v = list(v) if isinstance(v, (list, tuple)) else [v]
        return v * n if len(v) == 1 else v

    stride, pad = per_dim(named.get("stride", 1)), per_dim(padding)
    dilation = per_dim(named.get("dilation", 1))
    size = [(x.shape[2 + i] + 2 * pad[i] - dilation[i] * (w.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in range(n)]
    bias = named.get("bias")
    groups = named.get("groups", 1)
    if x.shape[1] != w.shape[1] * groups or w.shape[0] % groups or (bias is not None and bias.shape[0] != w.shape[0]):
        return walk.run(func, args, kwargs)  # raises PyTorch's own error
    return shell((x.shape[0], w.shape[0], *size), x)


@rule("scaled_dot_product_attention")
def scaled_dot_product_attention(walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """q and k go together per (head, dim); v goes with the output; every head keeps equally many of each."""
    named = {**dict(zip([a.name for a in func._schema.arguments], args)), **kwargs}
    q, k, v, mask = named["query"], named["key"], named["value"], named.get("attn_mask")
    place = walk.place(func)
    if named.get("enable_gqa") and k.dim() > 2 and q.shape[-3] != k.shape[-3]:
        k, v = (repeated(walk, t, q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    if q.shape[:-2] != k.shape[:-2] or k.shape[:-2] != v.shape[:-2]:
        return unknown(walk, func, args, kwargs)
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        return walk.run(func, args, kwargs)  # raises PyTorch's own error
    out = shell((*q.shape[:-1], v.shape[-1]), q)
    walk.attend(q, k, v)
    lq, lk, lv = _layers(walk, q), _layers(walk, k), _layers(walk, v)
    batch = tuple(q.shape[:-2])
    n_q, n_k = q.shape[-2], k.shape[-2]
    scores, dims = contract(
        walk, func, _insert(lq, -2), (*batch, n_q, 1, q.shape[-1]), _insert(lk, -3), (*batch, 1, n_k, k.shape[-1]), True
    )
    if mask is not None:
        scores = walk.graph.meet(
            scores, (*batch, n_q, n_k), aligned(_layers(walk, mask), q.dim()), padded(mask.shape, q.dim()), place
        )
    scores = walk.graph.reduce(scores, [len(batch) + 1], place, "is mixed by softmax")
    head_dims = [x for x in dims if varying(x)[-1] == x.ndim - 1]
    value_dims = [x for x in lv if x.shape[-1] > 1]
    _head_rows(walk, place, q.shape[-1], v.shape[-1], head_dims, value_dims)
    if named.get("scale") is None and head_dims:
        fix(walk, place, q.shape[-1], head_dims[0], walk.labels(q))
    values = tuple([np.swapaxes(x, -1, -2) for x in lv])
    left, _ = contract(
        walk, func, _insert(scores, -2), (*batch, n_q, 1, n_k), _insert(values, -3), (*batch, 1, v.shape[-1], n_k), True
    )
    walk.label(out, Labels(left))
    return out


def _head_rows(walk: Walk, place: str, n_qk: int, n_v: int, qk: Sequence[Layer], v: Sequence[Layer]) -> None:
    """Equal counts in every head; and q/k as many as v, since most code views v with k's head size."""
    rows = [x.reshape(-1, x.shape[-1]) for x in (*qk[:1], *v[:1])]
    if not rows:
        return
    if n_qk == n_v:
        if len(rows) == 1:
            rows.append(np.zeros((1, n_qk), np.int32))
        walk.graph.constrain("heads", place, np.concatenate(rows))
    else:
        for r in rows:
            walk.graph.constrain("heads", place, r)
