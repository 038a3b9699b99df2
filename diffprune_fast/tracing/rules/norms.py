"""Rules of normalisation layers: parameters join their channels, a GroupNorm's groups must stay rectangular."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..labels import Labels, Layers, varying
from ..scale_folding import of_parameters
from .contractions import add_bias
from .registry import aligned, padded, rule, shell

if TYPE_CHECKING:
    from ..walk import Walk


def _named(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip([a.name for a in func._schema.arguments], args)), **kwargs}


@rule("group_norm", "native_group_norm")
def group_norm(walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    named = _named(func, args, kwargs)
    x, weight, bias = named["input"], named.get("weight"), named.get("bias")
    n = int(named["num_groups"] if "num_groups" in named else named["group"])
    composite = func.overloadpacket.__name__ == "group_norm"
    fits = x.shape[1] % n == 0 and _fit(x.shape[1], weight, bias)
    out = shell(x.shape, x) if composite and fits else walk.run(func, args, kwargs)
    labels = walk.labels(x)
    place = walk.place(func)
    layers: Layers = ()
    for layer in labels.layers if labels is not None else ():
        if varying(layer) != (1,):
            walk.graph.freeze(layer, f"is a position inside a norm of {place}")
            continue
        layers = (layer,)
        walk.norm_attribute(weight, "num_channels", layer)
        if layer.size == n:
            walk.norm_attribute(weight, "num_groups", layer)
        walk.graph.constrain("norm" if layer.size > n else "instance_norm", place, layer.reshape(n, -1))
    layers = add_bias(walk, func, layers, x.shape, weight, 1)
    layers = add_bias(walk, func, layers, x.shape, bias, 1)
    walk.label(out if composite else out[0], Labels(layers))
    return out


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Statistics run over the channels that are there; affine parameters join them."""
    named = _named(func, args, kwargs)
    x, weight, bias = named["input"], named.get("weight"), named.get("bias")
    composite = func.overloadpacket.__name__ in ("layer_norm", "rms_norm")
    over = list(named.get("normalized_shape", x.shape[-1:]))
    fits = list(x.shape[x.dim() - len(over) :]) == over and all(
        p is None or list(p.shape) == over for p in (weight, bias)
    )
    out = shell(x.shape, x) if composite and fits else walk.run(func, args, kwargs)
    labels = walk.labels(x)
    layers = labels.layers if labels is not None else ()
    for parameter in (weight, bias):
        mine = walk.labels(parameter) if parameter is not None else None
        if parameter is not None and (layers or mine is not None):
            theirs = aligned(mine.layers, x.dim()) if mine is not None else ()
            layers = walk.graph.meet(layers, x.shape, theirs, padded(parameter.shape, x.dim()), walk.place(func))
    last = [y for y in layers if y.shape[-1] > 1]
    if last:
        one = np.moveaxis(last[0], -1, 0).reshape(last[0].shape[-1], -1)[:, 0]
        walk.norm_attribute(weight, "normalized_shape", one)
    feeds = of_parameters(walk, weight, bias) if weight is not None else None
    walk.label(out if composite else out[0], Labels(layers, feeds))
    return out


@rule(
    "batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training", "instance_norm", "_batch_norm_impl_index"
)
def batch_norm(walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    named = _named(func, args, kwargs)
    x = named["input"]
    composite = func.overloadpacket.__name__ in ("batch_norm", "instance_norm")
    fits = _fit(x.shape[1], *_affine(named))
    out = shell(x.shape, x) if composite and fits else walk.run(func, args, kwargs)
    labels = walk.labels(x)
    layers: Layers = ()
    for layer in labels.layers if labels is not None else ():
        if varying(layer) == (1,):
            layers = (layer,)
        else:
            walk.graph.freeze(layer, f"is a position inside a norm of {walk.place(func)}")
    for parameter in _affine(named):
        layers = add_bias(walk, func, layers, x.shape, parameter, 1)
    for layer in layers:
        for parameter in _affine(named)[:1]:
            walk.attribute(parameter, "num_features", layer)
    walk.label(out if composite else out[0], Labels(layers))
    return out


def _fit(n: int, *parameters: Tensor | None) -> bool:
    """Whether a norm's parameters have its channels; where they don't, PyTorch's own op raises."""
    return all(p is None or p.shape[0] == n for p in parameters)


def _affine(named: dict[str, Any]) -> Sequence[Tensor]:
    found = [named.get(n) for n in ("weight", "bias", "running_mean", "running_var")]
    return [p for p in found if p is not None]
