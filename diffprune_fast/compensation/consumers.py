"""Which layers lost inputs, and which of them can be solved for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..architectures.layers import CONVOLUTIONS, TRANSPOSED
from .patches import NORMS

KNOWN = (nn.Linear, *CONVOLUTIONS)
Kept = Mapping[tuple[str, int], np.ndarray]


@dataclass(frozen=True)
class Consumer:
    """A layer that lost inputs.

    place: its number among them. inputs: ``(kept inputs,)`` int64 of the dense layer's. outputs: ``(kept outputs,)``,
    None for all. factor: ``(kept outputs,)``, what slicing multiplied the layer's rows by; None for nothing.
    """

    name: str
    place: int
    inputs: Tensor
    outputs: Tensor | None
    factor: Tensor | None


def consumers(pruned: nn.Module, dense: nn.Module, kept: Kept) -> tuple[list[Consumer], dict[str, str]]:
    """The layers to solve, and the others that lost inputs with the reason why they are left alone.

    Raises ValueError where ``kept`` isn't what happened between the two models.
    """
    before: dict[str, Any] = dict(dense.named_modules())
    after: dict[str, Any] = dict(pruned.named_modules())
    owners = _owners(pruned)
    all_frozen = not any(p.requires_grad for p in pruned.parameters())
    found: list[Consumer] = []
    alone: dict[str, str] = {}
    for (parameter, dim), index in kept.items():
        path, _, leaf = parameter.rpartition(".")
        layer, was = after.get(path), before.get(path)
        if leaf != "weight" or layer is None or was is None or dim != _input_dim(layer):
            continue
        if len(index) == was.weight.shape[dim]:
            continue
        reason = _reason(layer, was, owners, all_frozen)
        if reason is not None:
            alone[path] = reason
            continue
        found.append(_consumer(path, len(found), layer, was, kept))
    return found, alone


def norms(pruned: nn.Module, dense: nn.Module, kept: Kept, first: int) -> list[Consumer]:
    """The norms that lost channels and have a weight and bias to refit; their places are numbered from ``first``."""
    before: dict[str, Any] = dict(dense.named_modules())
    after: dict[str, Any] = dict(pruned.named_modules())
    owners, all_frozen = _owners(pruned), not any(p.requires_grad for p in pruned.parameters())
    found: list[Consumer] = []
    for (parameter, dim), index in kept.items():
        path, _, leaf = parameter.rpartition(".")
        layer, was = after.get(path), before.get(path)
        if dim != 0 or leaf != "weight" or not isinstance(layer, NORMS) or was is None or type(layer) is not type(was):
            continue
        keep = torch.from_numpy(np.asarray(index, np.int64))
        own = [layer.weight, layer.bias]
        if any(p is None or owners[id(p)] > 1 or not (p.requires_grad or all_frozen) for p in own):
            continue
        # A norm of queries whose weight carries a softmax scale isn't what it was.
        if torch.equal(layer.weight, was.weight.index_select(0, keep.to(was.weight.device))):
            found.append(Consumer(path, first + len(found), keep, keep, None))
    return found


def _input_dim(layer: nn.Module) -> int | None:
    """The dim of ``layer.weight`` that inputs are counted along; None for what has no inputs to combine."""
    if isinstance(layer, TRANSPOSED):
        return 0
    weight = getattr(layer, "weight", None)
    counted = isinstance(layer, KNOWN) or hasattr(layer, "in_features") or hasattr(layer, "in_channels")
    return 1 if counted and isinstance(weight, Tensor) and weight.ndim >= 2 else None


def _reason(layer: Any, was: nn.Module, owners: Mapping[int, int], all_frozen: bool) -> str | None:
    weight = layer.weight
    if isinstance(layer, TRANSPOSED):
        return "a transposed convolution"
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        return "quantised or computed weights"
    if not isinstance(layer, KNOWN) or type(layer).forward not in [k.forward for k in KNOWN]:
        return f"its class, {type(layer).__name__}, computes something of its own"
    if owners[id(weight)] > 1 or (layer.bias is not None and owners.get(id(layer.bias), 1) > 1):
        return "tied weights"
    # A model that is frozen as a whole is one that is being used, not one that somebody chose layers of.
    if not weight.requires_grad and not all_frozen:
        return "frozen: requires_grad=False"
    if not isinstance(was, type(layer)):
        return f"the dense model has a {type(was).__name__} in its place"
    return None


def _owners(model: nn.Module) -> dict[int, int]:
    """How many modules hold each parameter."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                owners[id(p)] = owners.get(id(p), 0) + 1
    return owners


def _consumer(path: str, place: int, layer: Any, was: Any, kept: Kept) -> Consumer:
    name = f"{path}.weight"
    inputs, outputs = kept[name, 1], kept.get((name, 0))
    rows = layer.weight.shape[0]
    expected = (was.weight.shape[0] if outputs is None else len(outputs), len(inputs))
    if tuple(layer.weight.shape[:2]) != expected:
        raise ValueError(
            f"kept says that {name} has {expected[0]} outputs and {expected[1]} inputs, the pruned model's has "
            f"{rows} and {layer.weight.shape[1]}: give the kept indices of this very model"
        )
    keep_in = torch.from_numpy(np.asarray(inputs, np.int64))
    keep_out = None if outputs is None else torch.from_numpy(np.asarray(outputs, np.int64))
    return Consumer(path, place, keep_in, keep_out, _factor(layer.weight, was.weight, keep_in, keep_out))


def _factor(sliced: Tensor, dense: Tensor, inputs: Tensor, outputs: Tensor | None) -> Tensor | None:
    """What every row was multiplied by when it was sliced (a softmax scale that follows the head size); None where
    nothing was, or where the rows aren't multiples of the dense model's."""
    old = dense.detach().index_select(1, inputs.to(dense.device)).flatten(1)
    old = old if outputs is None else old.index_select(0, outputs.to(dense.device))
    wide = torch.float64 if sliced.dtype == torch.float64 else torch.float32
    old, new = old.to(sliced.device, wide), sliced.detach().flatten(1).to(wide)
    tolerance = 4 * max(torch.finfo(sliced.dtype).eps, torch.finfo(dense.dtype).eps)
    size = old.square().sum(1)
    factor = torch.where(size > 0, (old * new).sum(1) / size.clamp_min(torch.finfo(wide).tiny), torch.ones_like(size))
    exact = (new - factor[:, None] * old).abs().amax(1) <= tolerance * new.abs().amax(1)
    factor = torch.where(exact & ((factor - 1).abs() > 2 * tolerance), factor, torch.ones_like(factor))
    return None if bool((factor == 1).all()) else factor
