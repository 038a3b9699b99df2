"""Rules of convolutions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from ..constants import is_diagonal
from ..labels import LabelMap, LabelMaps, Labels, varying
from ..scale_folding import targets_of_projection
from .contractions import all_zero, join_vector
from .registry import Operation, empty_output, rule


@rule("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(
    op: Operation,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    transposed: bool = False,
    groups: int = 1,
) -> Any:
    walk = op.walk
    transposed = transposed or "transpose" in op.name
    out = None if transposed else _output(x, weight, bias, stride, padding, dilation, groups)
    if out is None:
        out = op.run()
    n_spatial = weight.dim() - 2
    channels, batch = _input_labels(op, x, n_spatial)
    of_weight = _weight_labels(op, weight)
    cin, cout, depthwise = _join_weight(op, channels, weight, of_weight, groups, transposed)
    axis = out.dim() - n_spatial - 1
    maps: LabelMaps = ()
    if batch is not None:  # resamplers put channels there, one by one through a kernel
        maps = (batch.reshape(-1, *(1,) * (out.dim() - 1)),)
    if cout is not None and cout.size > 1:
        view = [1] * out.dim()
        view[axis] = -1
        maps = (*maps, cout.reshape(view))
    maps = join_vector(op, maps, out.shape, bias, axis)
    pixels = math.prod(x.shape[-n_spatial:] if transposed else out.shape[-n_spatial:])
    macs = (out.shape[0] if axis else 1) * pixels * weight.numel()
    rows, cols = (cin, cout) if is_diagonal(weight) else of_weight
    walk.cost(op.place, macs, tuple([y for y in (rows, cols, batch) if y is not None]))
    if cin is not None:
        walk.attribute(weight, "in_channels", cin)
        if depthwise:
            walk.attribute(weight, "groups", cin)
    if cout is not None:
        walk.attribute(weight, "out_channels", cout)
    targets = targets_of_projection(walk, weight, bias) if not transposed else None
    walk.label(out, Labels(maps, targets, zero=batch is None and all_zero(walk, weight, bias)))
    return out


def _output(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor | None:
    """The output by formula for the common case (PyTorch's meta kernel is a slow decomposition); else None."""
    n = weight.dim() - 2
    if isinstance(padding, str) or x.dim() != n + 2 or x.device.type != "meta":
        return None
    if x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        return None
    if bias is not None and bias.shape[0] != weight.shape[0]:
        return None

    def per_dim(v: Any) -> list[int]:
        v = list(v) if isinstance(v, (list, tuple)) else [v]
        return v * n if len(v) == 1 else v

    sizes = zip(x.shape[2:], weight.shape[2:], per_dim(stride), per_dim(padding), per_dim(dilation))
    pixels = [(size + 2 * pad - step * (kernel - 1) - 1) // by + 1 for size, kernel, by, pad, step in sizes]
    return empty_output((x.shape[0], weight.shape[0], *pixels), x)


def _input_labels(op: Operation, x: Tensor, n_spatial: int) -> tuple[LabelMap | None, LabelMap | None]:
    """The labels along a convolution's input channels, ``(C,)``, and its batch, ``(N,)``; labels elsewhere stay."""
    found = batch = None
    batched = x.dim() == n_spatial + 2
    for label_map in op.walk.maps(x):
        dims = varying(label_map)
        if dims == (1 if batched else 0,):
            found = label_map.reshape(-1)
        elif batched and dims == (0,):
            batch = label_map.reshape(-1)
        elif batched and 1 in dims and all(label_map.shape[d] == 1 for d in range(2, label_map.ndim)):
            found = label_map.reshape(label_map.shape[0], -1)[0]
            op.walk.graph.tie(label_map, (0,), op.place)
        else:
            op.walk.graph.freeze(label_map, f"is a spatial position of {op.place}")
    return found, batch


def _weight_labels(op: Operation, weight: Tensor) -> tuple[LabelMap | None, LabelMap | None]:
    """A weight's labels along dims 0 and 1; along kernel dims nothing can be removed."""
    found: list[LabelMap | None] = [None, None]
    for label_map in op.walk.maps(weight):
        dims = varying(label_map)
        if dims in ((0,), (1,)):
            found[dims[0]] = label_map.reshape(-1)
        elif any(d < 2 for d in dims):
            op.walk.graph.freeze(label_map, "is a channel and kernel position at once")
    return found[0], found[1]


def _join_input(op: Operation, x: LabelMap | None, weight: LabelMap | None) -> None:
    """Input channels meet the weight's."""
    if x is not None and weight is not None:
        op.walk.graph.link(x, weight, op.place)
    for alone in (x,) if weight is None else (weight,) if x is None else ():
        if alone is not None:
            op.walk.graph.freeze(alone, f"meets an unlabelled dimension in {op.place}")


def _tile(label_map: LabelMap | None, size: int, groups: int) -> LabelMap | None:
    return None if label_map is None else np.broadcast_to(label_map.reshape(1, -1), (groups, size)).reshape(-1)


def _join_weight(
    op: Operation,
    x: LabelMap | None,
    weight: Tensor,
    of_weight: tuple[LabelMap | None, LabelMap | None],
    groups: int,
    transposed: bool,
) -> tuple[LabelMap | None, LabelMap | None, bool]:
    """Join a convolution's input; the labels of its input and output channels, and whether it is depthwise."""
    if is_diagonal(weight) and groups == 1:
        return x, x, False
    rows, cols = of_weight
    n0, n1 = weight.shape[0], weight.shape[1]
    if groups == 1:
        _join_input(op, x, rows if transposed else cols)
        return x, cols if transposed else rows, False
    if (n0 if transposed else n1 * groups) == groups:
        if not transposed:
            repeated = x if x is None or rows is None else np.repeat(x, n0 // groups)
            _join_input(op, repeated, rows)
            return x, rows, True
        _join_input(op, x, rows)
        if n1 == 1:
            return x, rows, True
        if rows is not None and cols is not None:
            op.walk.graph.freeze(rows, f"is a group of {op.place}")
        return x, _tile(cols, n1, groups), False
    if rows is not None:
        op.walk.graph.constrain("conv_groups", op.place, rows.reshape(groups, -1))
    _join_input(op, x, rows if transposed else _tile(cols, n1, groups))
    return x, _tile(cols, n1, groups) if transposed else rows, False
