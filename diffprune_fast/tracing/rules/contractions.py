"""Rules of contractions: operands meet in one index space, then the contracted dim is summed away."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..constants import is_zero
from ..labels import LabelMap, LabelMaps, Labels, varying
from ..scale_folding import targets_of_projection
from ..walk import Walk
from .registry import Operation, align, empty_output, pad_shape, rule


def contract(
    op: Operation, a: LabelMaps, sa: Sequence[int], b: LabelMaps, sb: Sequence[int], attention: bool = False
) -> tuple[LabelMaps, tuple[LabelMap, ...]]:
    """Join in a space whose last dim is contracted; the label maps that are left, and those that were contracted."""
    last = len(sa) - 1
    joined = op.walk.graph.join(a, sa, b, sb, op.place, summed=(last,))
    total = math.prod([max(m, n) for m, n in zip(sa, sb)])
    op.walk.cost(op.place, total, joined, attention)
    left = tuple([x.reshape(x.shape[:-1]) for x in joined if x.shape[-1] == 1])
    return left, tuple([x for x in joined if x.shape[-1] > 1])


def insert_dim(maps: LabelMaps, axis: int) -> LabelMaps:
    return tuple([np.expand_dims(x, axis) for x in maps])


def join_vector(op: Operation, maps: LabelMaps, shape: Sequence[int], vector: Tensor | None, axis: int) -> LabelMaps:
    """Join a 1-D parameter (a bias, a norm's weight) with the dim ``axis`` of an output."""
    if vector is None:
        return maps
    view = [1] * len(shape)
    view[axis] = vector.shape[0]
    mine = tuple([x.reshape(view) for x in op.walk.maps(vector)])
    if not mine and not maps:
        return maps
    return op.walk.graph.join(maps, shape, mine, view, op.place)


def all_zero(walk: Walk, *parameters: Tensor | None) -> bool:
    """Whether all that there are of a layer's parameters are zero in the channels that go."""
    found = [walk.labels(p) for p in parameters if p is not None]
    return all(labels is not None and labels.zero for labels in found)


@rule("linear")
def linear(op: Operation, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    walk = op.walk
    if weight.dim() != 2:
        return op.run_unknown()
    if x.shape[-1] != weight.shape[1] or (bias is not None and bias.shape[0] != weight.shape[0]):
        return op.run()  # raises PyTorch's own error
    out = empty_output((*x.shape[:-1], weight.shape[0]), x)
    ndim = x.dim() + 1
    n = 1 if is_zero(x) else x.shape[-1]  # zeros (an RNN's first state) leave any inputs out
    sx, sw = (*x.shape[:-1], 1, n), pad_shape(weight.shape, ndim)
    left, summed = contract(op, insert_dim(walk.maps(x), -2), sx, align(walk.maps(weight), ndim), sw)
    left = join_vector(op, left, out.shape, bias, -1)
    walk.attribute(weight, "in_features", *[y for y in summed if varying(y) == (ndim - 1,)])
    walk.attribute(weight, "out_features", *[y for y in left if varying(y) == (out.dim() - 1,)])
    zero = all(varying(y) == (out.dim() - 1,) for y in left) and all_zero(walk, weight, bias)
    walk.label(out, Labels(left, targets_of_projection(walk, weight, bias), zero=zero))
    return out


@rule("mm", "bmm", "addmm", "baddbmm")
def matrix_product(op: Operation, first: Tensor, beta: float = 1) -> Any:
    walk = op.walk
    a, b = op.args[-2:]
    bias = first if len(op.args) == 3 and beta != 0 else None
    if a.shape[-1] != b.shape[-2] or a.shape[:-2] != b.shape[:-2]:
        return op.run()  # raises PyTorch's own error
    out = empty_output((*a.shape[:-1], b.shape[-1]), a)
    rows, cols = insert_dim(walk.maps(a), -2), insert_dim(walk.maps(b), -3)
    cols = tuple([np.swapaxes(x, -1, -2) for x in cols])
    sa, sb = (*a.shape[:-1], 1, a.shape[-1]), (*b.shape[:-2], 1, b.shape[-1], b.shape[-2])
    weights = walk.name_of(a) is not None or walk.name_of(b) is not None
    if not weights:
        walk.attend(a, b)
    left, _ = contract(op, rows, sa, cols, sb, attention=not weights)
    if bias is not None:
        mine = align(walk.maps(bias), out.dim())
        if mine or left:
            left = walk.graph.join(left, out.shape, mine, pad_shape(bias.shape, out.dim()), op.place)
    walk.label(out, Labels(left))
    return out
