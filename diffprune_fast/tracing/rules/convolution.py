"""Rules of convolutions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..constants import is_diagonal
from ..labels import Labels, Layer, Layers, varying
from ..scale_folding import of_projection
from .contractions import _layers, add_bias
from .registry import rule, shell

if TYPE_CHECKING:
    from ..walk import Walk


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
