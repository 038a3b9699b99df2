"""Rules of operations that work element by element, reduce, or make tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..constants import is_diagonal, spread
from ..labels import Labels
from ..scale_folding import of_elementwise
from ..spelled_norms import Statistic, power_of, raised
from .registry import aligned, dims_of, padded, rule, rule_of_first, shell, unknown

if TYPE_CHECKING:
    from ..walk import Walk


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


_BINARY = """add add_ sub sub_ rsub mul mul_ div div_ true_divide pow pow_ where maximum minimum fmod remainder eq ne lt
    le gt ge logical_and logical_or bitwise_and bitwise_or addcmul addcdiv lerp copy_ atan2 floor_divide masked_fill
    masked_fill_ _prelu_kernel clamp_min_ clamp_max_ addcmul_"""


@rule(*_IDENTITY.split())
def identity(walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    out = walk.run(func, args, kwargs)
    walk.label(out, walk.labels(args[0]))
    if walk.name_of(args[0]) is not None:  # a parameter in another dtype is still that parameter
        out._parameter_name = walk.name_of(args[0])
    return out


@rule(*_UNARY.split(), *_LINEAR.split())
def unary(walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    if any(isinstance(a, Tensor) for a in (*args[1:], *kwargs.values())):  # clamp between tensors, for one
        return elementwise(walk, func, args, kwargs)
    hot = func in (torch.ops.aten.silu.default, torch.ops.aten.gelu.default) and x.is_meta
    out = shell(x.shape, x) if hot else walk.run(func, args, kwargs)
    labels = walk.labels(x)
    name = func.overloadpacket.__name__
    linear = name in _LINEAR.split()
    power = raised(walk, name, args)
    for o in out if isinstance(out, (tuple, list)) else (out,):
        if labels is not None and isinstance(o, Tensor) and o.shape == x.shape:
            walk.label(o, Labels(labels.layers, labels.feeds if linear else None, power))
    return out


@rule(*_BINARY.split())
def elementwise(walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    first = tensors[0]
    inplace = func._schema.is_mutable
    name = func.overloadpacket.__name__
    plain = name in ("add", "sub", "mul", "div") and all(t.dtype == first.dtype for t in tensors)
    if plain and all(t.shape == first.shape for t in tensors) and any(t.is_meta for t in tensors):
        out = shell(first.shape, first)
    else:
        out = walk.run(func, args, kwargs)
    ndim = out.dim()
    operands = []
    for t in tensors:
        labels = walk.labels(t)
        mine = aligned(labels.layers, ndim) if labels is not None else ()
        operands.append((mine, padded(spread(walk, t), ndim)))
    layers = walk.graph.meet_all(operands, ndim, walk.place(func))
    found = Labels(layers, of_elementwise(walk, name, args), raised(walk, name, args))
    walk.label(args[0] if inplace else out, found)
    return args[0] if inplace else out


_REDUCTIONS = """mean sum amax amin var std prod norm linalg_vector_norm logsumexp any all max min argmax argmin
    var_mean std_mean"""


@rule_of_first(*_REDUCTIONS.split())
def reduction(walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, labels: Labels) -> Any:
    x = args[0]
    if len(args) > 1 and isinstance(args[1], Tensor):  # max(a, b)
        return elementwise(walk, func, args, kwargs)
    named = [a.name for a in func._schema.arguments]
    values = {**dict(zip(named, args)), **kwargs}
    dims = dims_of(values.get("dim"), x.dim())
    keepdim = bool(values.get("keepdim", False))
    place = walk.place(func)
    over = tuple([y for y in labels.layers if any(y.shape[d] > 1 for d in dims)])
    if over and keepdim and func.overloadpacket.__name__ == "mean":
        out._statistic = Statistic(*power_of(labels), over, f"reduces over channels in {place}")
        walk.statistics += 1
        kept = tuple([y for y in labels.layers if not any(y is z for z in over)])
    else:
        kept = walk.graph.reduce(labels.layers, dims, place, "reduces")
    for o in out if isinstance(out, (tuple, list)) else (out,):
        if o.dim() == x.dim() - (0 if keepdim else len(dims)):
            layers = kept if keepdim else tuple([y.squeeze(axis=tuple(dims)) for y in kept])
            walk.label(o, Labels(tuple([y for y in layers if y.size > 1])))
    return out


@rule_of_first("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "sort", "logcumsumexp")
def along_dim(walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, labels: Labels) -> Any:
    """The result at an element depends on the whole dim."""
    x = args[0]
    dim = (args[1] if len(args) > 1 and not isinstance(args[1], bool) else kwargs.get("dim", -1)) % x.dim()
    name = func.overloadpacket.__name__
    kept = walk.graph.reduce(labels.layers, [dim], walk.place(func), f"is mixed by {name}")
    for o in out if isinstance(out, (tuple, list)) else (out,):
        walk.label(o, Labels(kept))
    return out


_SPATIAL = """upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
    _upsample_nearest_exact2d upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa
    upsample_bicubic2d _upsample_bicubic2d_aa upsample_trilinear3d avg_pool1d avg_pool2d avg_pool3d
    max_pool1d max_pool2d max_pool3d max_pool2d_with_indices adaptive_avg_pool1d adaptive_avg_pool2d
    _adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d pad constant_pad_nd reflection_pad1d
    reflection_pad2d replication_pad2d replication_pad3d"""


@rule_of_first(*_SPATIAL.split())
def spatial(walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, labels: Labels) -> Any:
    """Channels pass; a labelled dim that the op resizes stays whole."""
    x = args[0]
    name = func.overloadpacket.__name__
    if name in ("pad", "constant_pad_nd"):
        touched = [x.dim() - 1 - i for i in range(len(args[1]) // 2) if any(args[1][2 * i : 2 * i + 2])]
    else:
        touched = [1] if x.dim() == 2 else list(range(2 if x.dim() > 3 or "1d" in name else 1, x.dim()))
    for o in out if isinstance(out, (tuple, list)) else (out,):
        kept = tuple([y for y in labels.layers if not any(y.shape[d] > 1 for d in touched)])
        for y in labels.layers:
            if not any(y is k for k in kept):
                walk.graph.freeze(y, f"is resized in {walk.place(func)}")
        walk.label(o, Labels(kept))
    return out


@rule_of_first("embedding")
def embedding(walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, labels: Labels) -> Any:
    weight = args[0]
    kept = []
    for layer in labels.layers:
        if layer.shape[0] > 1:
            walk.graph.freeze(layer, f"is a vocabulary of {walk.place(func)}")
        else:
            kept.append(layer.reshape((1,) * (out.dim() - 1) + (-1,)))
            walk.attribute(weight, "embedding_dim", kept[-1])
    walk.label(out, Labels(tuple(kept)))
    return out


@rule("new_zeros", "new_ones", "new_full", "new_empty", "full", "scalar_tensor")
def made(walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of an operand only dtype and device count."""
    return walk.run(func, args, kwargs)


@rule("index_put_")
def index_put(walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not is_diagonal(args[0]):
        return unknown(walk, func, args, kwargs)
    labels = walk.labels(args[2])
    for layer in labels.layers if labels is not None else ():
        walk.graph.freeze(layer, f"is a kernel position of {walk.place(func)}")
    return walk.run(func, args, kwargs)
