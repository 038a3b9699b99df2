"""Rules of normalisation layers: parameters join their channels, a GroupNorm's groups must stay rectangular."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .. import computed_weights
from ..labels import LabelMaps, Labels, varying
from ..scale_folding import targets_of_parameters
from .contractions import all_zero, join_vector
from .registry import Operation, align, each, empty_output, pad_shape, rule


@rule("group_norm", "native_group_norm")
def group_norm(
    op: Operation,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    num_groups: int = 0,
    group: int = 0,
) -> Any:
    walk, place, n = op.walk, op.place, int(num_groups or group)
    out = _output(op, x, x.shape[1] % n == 0 and _fit(x.shape[1], weight, bias))
    maps: LabelMaps = ()
    for label_map in walk.maps(x):
        if varying(label_map) != (1,):
            walk.graph.freeze(label_map, f"is a position inside a norm of {place}")
            continue
        maps = (label_map,)
        walk.norm_attribute(weight, "num_channels", label_map)
        if label_map.size == n:
            walk.norm_attribute(weight, "num_groups", label_map)
        walk.graph.constrain("norm" if label_map.size > n else "instance_norm", place, label_map.reshape(n, -1))
    for parameter in (weight, bias):
        maps = join_vector(op, maps, x.shape, parameter, 1)
    walk.label(each(out)[0], Labels(maps))
    return out


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(
    op: Operation,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Any:
    """Statistics run over the channels that are there; affine parameters join them."""
    walk, over = op.walk, list(normalized_shape)
    affine = [p for p in (weight, bias) if p is not None]
    out = _output(op, x, list(x.shape[x.dim() - len(over) :]) == over and all(list(p.shape) == over for p in affine))
    maps = walk.maps(x)
    for parameter in affine:
        theirs = align(walk.maps(parameter), x.dim())
        if maps or theirs:
            maps = walk.graph.join(maps, x.shape, theirs, pad_shape(parameter.shape, x.dim()), op.place)
    last = [y for y in maps if y.shape[-1] > 1]
    if last:
        one = np.moveaxis(last[0], -1, 0).reshape(last[0].shape[-1], -1)[:, 0]
        walk.norm_attribute(weight, "normalized_shape", one)
    targets = targets_of_parameters(walk, weight, bias) if weight is not None else None
    walk.label(each(out)[0], Labels(maps, targets))
    return out


@rule(
    "batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training", "instance_norm", "_batch_norm_impl_index"
)
def batch_norm(
    op: Operation,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
) -> Any:
    walk = op.walk
    affine = [p for p in (weight, bias, running_mean, running_var) if p is not None]
    out = _output(op, x, _fit(x.shape[1], *affine))
    maps: LabelMaps = ()
    for label_map in walk.maps(x):
        if varying(label_map) == (1,):
            maps = (label_map,)
        else:
            walk.graph.freeze(label_map, f"is a position inside a norm of {op.place}")
    for parameter in affine:
        maps = join_vector(op, maps, x.shape, parameter, 1)
    for label_map in maps:
        for parameter in affine[:1]:
            walk.attribute(parameter, "num_features", label_map)
    walk.label(each(out)[0], Labels(maps))
    return out


@rule("_weight_norm", "_weight_norm_interface")
def weight_norm(op: Operation, v: Tensor, g: Tensor, dim: int = 0) -> Any:
    """``g * v / |v|``, the norm over all dims but one: along that one channels go as those of any weight."""
    walk, out = op.walk, op.run()
    norms = align(walk.maps(g), v.dim()), pad_shape(g.shape, v.dim())
    maps = walk.graph.join(walk.maps(v), v.shape, *norms, op.place)
    normed = tuple([x for x in maps if varying(x) != (dim,)])
    if normed and not (dim == 0 and computed_weights.note_gain(walk, g, v)):
        for label_map in normed:
            walk.graph.freeze(label_map, f"changes the norm of a weight in {op.place}")
        maps = tuple([x for x in maps if varying(x) == (dim,)])
    walk.label(each(out)[0], Labels(maps, zero=all_zero(walk, v, g)))
    return out


def _output(op: Operation, x: Tensor, fits: bool) -> Any:
    """A norm's output: without PyTorch's meta kernel where it has a single one."""
    single = not op.name.startswith(("native", "_"))
    return empty_output(x.shape, x) if single and fits else op.run()


def _fit(n: int, *parameters: Tensor | None) -> bool:
    """Whether a norm's parameters have its channels; where they don't, PyTorch's own op raises."""
    return all(p is None or p.shape[0] == n for p in parameters)
