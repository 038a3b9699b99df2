"""Rules of operations that work element by element, reduce, or make tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..constants import varying_shape
from ..labels import LabelMap, LabelMaps, Labels, varying
from ..notes import note_on, read_note
from ..scale_folding import targets_of_elementwise
from ..spelled_norms import freeze_statistic, note_statistic, power_after
from .registry import Operation, align, apply_rule, dims_of, each, empty_output, pad_shape, rule, rule_of_first

_IDENTITY = (
    "alias contiguous clone detach detach_ dropout dropout_ to _to_copy lift_fresh requires_grad_ type_as positive"
)


_LINEAR = "neg"


_UNARY = """abs acos asin atan bernoulli ceil celu clamp clamp_ clamp_max clamp_min cos cosh elu elu_ erf exp expm1
    feature_dropout floor gelu hardsigmoid hardswish hardswish_ hardtanh hardtanh_ leaky_relu leaky_relu_ log log1p
    logical_not log_sigmoid mish nan_to_num native_dropout ones_like zeros_like reciprocal relu relu_ relu6 round rsqrt
    selu sigmoid sigmoid_ sign silu silu_ sin sinh softplus sqrt square tan tanh tanh_ threshold empty_like full_like
    rand_like randn_like bitwise_not isnan isinf isfinite nan_to_num_ exp_ neg_ sqrt_ square_ hardsigmoid_ mish_ fill_
    zero_"""


# What they make of zero is zero.
_OF_ZERO_NAMES = """abs asin atan ceil celu elu erf expm1 floor gelu hardswish leaky_relu log1p mish neg relu relu6
    round selu sign silu sin sinh sqrt square tan tanh"""


_OF_ZERO = frozenset(_OF_ZERO_NAMES.split())


_BINARY = """add add_ sub sub_ rsub mul mul_ div div_ true_divide pow pow_ where maximum minimum fmod remainder eq ne lt
    le gt ge logical_and logical_or bitwise_and bitwise_or addcmul addcdiv lerp copy_ atan2 floor_divide masked_fill
    masked_fill_ _prelu_kernel clamp_min_ clamp_max_ addcmul_"""


@rule(*_IDENTITY.split())
def identity(op: Operation, x: Tensor) -> Any:
    out = op.run()
    op.walk.label(out, op.walk.labels(x))
    if op.walk.name_of(x) is not None:  # a parameter in another dtype is still that parameter
        note_on(out).parameter = op.walk.name_of(x)
    return out


@rule(*_UNARY.split(), *_LINEAR.split())
def unary(op: Operation, x: Tensor) -> Any:
    if any(isinstance(a, Tensor) for a in (*op.args[1:], *op.kwargs.values())):  # clamp between tensors, for one
        return elementwise(op, x)
    hot = op.func in (torch.ops.aten.silu.default, torch.ops.aten.gelu.default) and x.is_meta
    out = empty_output(x.shape, x) if hot else op.run()
    labels = op.walk.labels(x)
    linear = op.name in _LINEAR.split()
    power = power_after(op.walk, op.name, op.args)
    for o in each(out):
        if labels is not None and isinstance(o, Tensor) and o.shape == x.shape:
            zero = labels.zero and op.name.rstrip("_") in _OF_ZERO
            op.walk.label(o, Labels(labels.maps, labels.fold_targets if linear else None, power, zero=zero))
    return out


@rule(*_BINARY.split())
def elementwise(op: Operation, x: Tensor) -> Any:
    walk, name = op.walk, op.name
    tensors = [a for a in (*op.args, *op.kwargs.values()) if isinstance(a, Tensor)]
    if name == "where" and len(tensors) == 1:  # the ids of what is true
        return op.run_unknown()
    shape = _broadcast(op, tensors) if name in ("add", "sub", "mul", "div") else None
    out = op.run() if shape is None else empty_output(shape, tensors[0])
    ndim = out.dim()
    operands = [(align(walk.maps(t), ndim), pad_shape(varying_shape(t), ndim)) for t in tensors]
    maps = walk.graph.join_all(operands, ndim, op.place)
    found = Labels(maps, targets_of_elementwise(walk, name, op.args), power_after(walk, name, op.args))
    found.zero = _gives_zero(op, maps, ndim)
    result = x if op.func._schema.is_mutable else out
    walk.label(result, found)
    return result


def _broadcast(op: Operation, tensors: Sequence[Tensor]) -> tuple[int, ...] | None:
    """The sizes of an output whose dtype is its operands' and without values; None: it has to be run."""
    dtype = tensors[0].dtype
    if not dtype.is_floating_point or not any(t.is_meta for t in tensors) or op.kwargs.keys() - {"alpha"}:
        return None
    if any(t.dtype != dtype for t in tensors) or any(isinstance(a, complex) for a in op.args):
        return None
    rank = max(t.dim() for t in tensors)
    sizes = [set(column) - {1} for column in zip(*[pad_shape(t.shape, rank) for t in tensors])]
    return None if any(len(s) > 1 for s in sizes) else tuple([s.pop() if s else 1 for s in sizes])


def _gives_zero(op: Operation, maps: LabelMaps, ndim: int) -> bool:
    """Whether an operation on two operands is zero in the channels that go."""
    name, operands = op.name.rstrip("_"), [op.walk.labels(a) for a in op.args[:2]]
    zero = [x is not None and x.zero for x in operands]
    if name in ("div", "pow") and zero[0] and len(op.args) > 1 and isinstance(op.args[1], (int, float)):
        return name == "div" or op.args[1] > 0
    if name == "mul" and all(z or x is None for z, x in zip(zero, operands)):
        return any(zero)
    dims = {varying(x) for x in maps}
    every = [z and x is not None and {varying(y) for y in align(x.maps, ndim)} == dims for z, x in zip(zero, operands)]
    return any(every) if name == "mul" else name in ("add", "sub") and len(every) == 2 and all(every)


@rule("glu")
def glu(op: Operation, x: Tensor, dim: int = -1) -> Any:
    """One half of a dim times the sigmoid of the other half."""
    walk, half = op.walk, x.shape[dim] // 2
    if x.shape[dim] % 2:
        return op.run()  # raises PyTorch's own error
    value, switch = apply_rule(walk, torch.ops.aten.split.Tensor, (x, half, dim))
    switch = apply_rule(walk, torch.ops.aten.sigmoid.default, (switch,))
    return apply_rule(walk, torch.ops.aten.mul.Tensor, (value, switch))


_REDUCTIONS = """mean sum amax amin var std prod norm linalg_vector_norm logsumexp any all max min argmax argmin
    var_mean std_mean"""


_STATISTICS = frozenset(("mean", "linalg_vector_norm", "var", "std", "var_mean", "std_mean"))


@rule_of_first(*_REDUCTIONS.split())
def reduction(
    op: Operation, x: Tensor, labels: Labels, out: Any, dim: Any = None, keepdim: bool = False, other: Any = None
) -> Any:
    if other is not None:  # max(a, b)
        return elementwise(op, x)
    dims = dims_of(dim, x.dim())
    over = tuple([y for y in labels.maps if any(y.shape[d] > 1 for d in dims)])
    if over and keepdim and op.name in _STATISTICS:
        note_statistic(op.walk, op.name, labels, over, out, op.place)
        kept = tuple([y for y in labels.maps if not any(y is z for z in over)])
    elif op.name == "sum" and op.walk.is_zero(x):  # what goes has added nothing
        kept = tuple([y for y in labels.maps if not any(y is z for z in over)])
    else:
        kept = op.walk.graph.reduce(labels.maps, dims, op.place, "reduces")
    less_mean = read_note(x).statistic  # of channels less their mean only means over all of these are of a norm
    if less_mean is not None and not (keepdim and all(set(varying(y)) <= set(dims) for y in less_mean.maps)):
        freeze_statistic(op.walk, less_mean)
    for o in each(out):
        if o.dim() == x.dim() - (0 if keepdim else len(dims)):
            maps = kept if keepdim else tuple([y.squeeze(axis=tuple(dims)) for y in kept])
            zero = labels.zero and op.name in ("sum", "mean")
            op.walk.label(o, Labels(tuple([y for y in maps if y.size > 1]), zero=zero))
    return out


@rule_of_first("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "sort", "logcumsumexp")
def along_dim(op: Operation, x: Tensor, labels: Labels, out: Any, dim: int = -1) -> Any:
    """The result at an element depends on the whole dim."""
    kept = op.walk.graph.reduce(labels.maps, [dim % x.dim()], op.place, f"is mixed by {op.name}")
    for o in each(out):
        op.walk.label(o, Labels(kept))
    return out


_SPATIAL = """upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
    _upsample_nearest_exact2d upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa
    upsample_bicubic2d _upsample_bicubic2d_aa upsample_trilinear3d avg_pool1d avg_pool2d avg_pool3d
    max_pool1d max_pool2d max_pool3d max_pool2d_with_indices adaptive_avg_pool1d adaptive_avg_pool2d
    _adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d pad constant_pad_nd reflection_pad1d
    reflection_pad2d replication_pad2d replication_pad3d"""


@rule_of_first(*_SPATIAL.split())
def spatial(op: Operation, x: Tensor, labels: Labels, out: Any, pad: Sequence[int] | None = None) -> Any:
    """Channels pass; a labelled dim that the op resizes stays whole."""
    if pad is not None:
        resized = [x.dim() - 1 - i for i in range(len(pad) // 2) if any(pad[2 * i : 2 * i + 2])]
    else:
        resized = [1] if x.dim() == 2 else list(range(2 if x.dim() > 3 or "1d" in op.name else 1, x.dim()))
    for o in each(out):
        kept: list[LabelMap] = []
        for label_map in labels.maps:
            if any(label_map.shape[d] > 1 for d in resized):
                op.walk.graph.freeze(label_map, f"is resized in {op.place}")
            else:
                kept.append(label_map)
        op.walk.label(o, Labels(tuple(kept)))
    return out


@rule_of_first("embedding")
def embedding(op: Operation, weight: Tensor, labels: Labels, out: Any) -> Any:
    kept = []
    for label_map in labels.maps:
        if label_map.shape[0] > 1:
            op.walk.graph.freeze(label_map, f"is a vocabulary of {op.place}")
        else:
            kept.append(label_map.reshape((1,) * (out.dim() - 1) + (-1,)))
            op.walk.attribute(weight, "embedding_dim", kept[-1])
    op.walk.label(out, Labels(tuple(kept)))
    return out


@rule("new_zeros", "new_ones", "new_full", "new_empty", "full", "scalar_tensor")
def make_constant(op: Operation, like: Any) -> Any:
    """Of an operand only dtype and device count."""
    return op.run()
