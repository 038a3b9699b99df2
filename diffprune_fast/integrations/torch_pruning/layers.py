"""What Torch-Pruning's pruning functions do to a layer, as dims of its tensors and attributes that follow them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .library import tp

_CONV = nn.modules.conv._ConvNd
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.PReLU)


@dataclass(frozen=True)
class Cut:
    """What goes with a layer's channels.

    dims: tensor name to the dim that loses them. attributes: those that hold how many there are. modulo: indices above
    count anew, as of the inputs of a grouped convolution; 0 for none.
    """

    dims: Mapping[str, int]
    attributes: tuple[str, ...] = ()
    modulo: int = 0


def cut_of(layer: Any, prune: Any) -> Cut | None:
    """What a pruning function cuts of a layer; None for layers that have more to them (LSTM, attention, one's own)."""
    if isinstance(layer, _CONV):
        transposed = int(layer.transposed)
        if prune == tp.prune_depthwise_conv_out_channels:
            return None if transposed else Cut({"weight": 0, "bias": 0}, ("in_channels", "out_channels", "groups"))
        if prune == tp.prune_conv_out_channels:
            return Cut({"weight": transposed, "bias": 0}, ("out_channels",))
        if prune == tp.prune_conv_in_channels and not (transposed and layer.groups > 1):
            dim = 1 - transposed
            return Cut({"weight": dim}, ("in_channels",), layer.weight.shape[dim] if layer.groups > 1 else 0)
    if isinstance(layer, nn.Linear):
        if prune == tp.prune_linear_out_channels:
            return Cut({"weight": 0, "bias": 0}, ("out_features",))
        if prune == tp.prune_linear_in_channels:
            return Cut({"weight": 1}, ("in_features",))
    if isinstance(layer, nn.Embedding) and prune == tp.prune_embedding_out_channels:
        return Cut({"weight": 1}, ("embedding_dim",))
    if isinstance(layer, _NORMS) and prune in _OF_NORMS:
        if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) != 1:
            return None
        if isinstance(layer, nn.PReLU) and layer.num_parameters == 1:
            return Cut({})
        names = ("num_features", "num_channels", "normalized_shape", "num_parameters")
        held = tuple([name for name in names if hasattr(layer, name)])
        return Cut(dict.fromkeys(("weight", "bias", "running_mean", "running_var"), 0), held)
    return None


_OF_NORMS = (
    tp.prune_batchnorm_out_channels,
    tp.prune_layernorm_out_channels,
    tp.prune_groupnorm_out_channels,
    tp.prune_instancenorm_out_channels,
    tp.prune_prelu_out_channels,
)


def pruning_function(layer: Any, tensor: str, dim: int) -> Any:
    """The pruning function that cuts a layer's tensor along a dim; None where there is none, or another tensor's does.

    A bias goes with its weight's rows and is never named by itself.
    """
    if isinstance(layer, _CONV):
        out = tensor == "weight" and dim == int(layer.transposed)
        if layer.groups == layer.out_channels > 1:
            return tp.prune_depthwise_conv_out_channels if out else None
        if tensor == "weight" and dim < 2:
            return tp.prune_conv_out_channels if out else tp.prune_conv_in_channels
    if isinstance(layer, nn.Linear) and tensor == "weight":
        return tp.prune_linear_in_channels if dim else tp.prune_linear_out_channels
    if isinstance(layer, nn.Embedding) and dim == 1:
        return tp.prune_embedding_out_channels
    if isinstance(layer, _NORMS) and tensor == "weight":
        kind = tp.ops.module2type(layer)
        return tp.pruner.function.PrunerBox[kind].prune_out_channels
    return None
