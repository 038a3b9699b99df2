"""The operations in plain PyTorch: ground truth of the tests, baseline of the benchmarks, last fallback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .slice_channels import Slice, Step, set_data

if TYPE_CHECKING:
    from .channel_scores import ScoreTable


@torch.no_grad()
def channel_scores_(
    scores: Tensor,
    thetas: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
    table: ScoreTable,
    *,
    criterion: str = "abs",
    timestep_weights: Tensor | None = None,
    zero_grad: bool = False,
) -> Tensor:
    """As :func:`diffprune_fast.ops.channel_scores_`, without its checks."""
    for i, (theta, entry) in enumerate(zip(thetas, table.entries)):
        wide = torch.promote_types(theta.dtype, torch.float32)
        grad = None
        if grads is not None and criterion != "magnitude":
            grad = grads[i].to(wide)
            if timestep_weights is not None:
                grad = torch.tensordot(timestep_weights.to(grad), grad, dims=1)
        values = channel_values(theta.to(wide), grad, criterion).reshape(entry.shape)
        for units, dims in ((entry.row_units, (1, 2)), (entry.col_units, (0, 2))):
            if units is not None:
                sums = values.sum(dims).to(scores.dtype) * entry.weight
                _add_at_(scores, units.to(scores.device), sums)
        if zero_grad and grads is not None:
            grads[i].zero_()
    return scores


def channel_values(theta: Tensor, grad: Tensor | None, criterion: str) -> Tensor:
    """What an element contributes to its row's and its column's sum."""
    if criterion == "magnitude":
        return theta * theta
    assert grad is not None
    product = theta * grad
    if criterion == "abs":
        return product.abs()
    return product * product if criterion == "square" else product


def _add_at_(scores: Tensor, units: Tensor, sums: Tensor) -> None:
    """``scores[units] += sums``, units of -1 left out; deterministic on GPUs too, where index_add_ isn't."""
    stays = units >= 0
    where, what = units[stays].long(), sums[stays]
    if scores.device.type == "cpu":
        scores.index_add_(0, where, what)
    else:
        scores.index_put_((where,), what, accumulate=True)


@torch.no_grad()
def slice_channels_(tensors: Sequence[Tensor], slices: Sequence[Slice]) -> None:
    """As :func:`diffprune_fast.ops.slice_channels_`, without its checks."""
    for step in slice_steps(tensors, slices):
        step()


@torch.no_grad()
def slice_steps(tensors: Sequence[Tensor], slices: Sequence[Slice]) -> list[Step]:
    """As :func:`diffprune_fast.ops.slice_channels.slice_steps`: every slice is made before the first tensor changes."""
    pieces = [slice_channels(tensor.detach(), piece) for tensor, piece in zip(tensors, slices)]
    return [step for tensor, piece in zip(tensors, pieces) for step in set_data(tensor, piece)]


@torch.no_grad()
def slice_channels(tensor: Tensor, piece: Slice) -> Tensor:
    """A tensor's kept slice as a new tensor, in the same memory format."""
    out = tensor
    for dim, keep in piece.keep.items():
        out = out.index_select(dim, keep.to(tensor.device))
    if out is tensor:
        out = tensor.clone(memory_format=torch.preserve_format)
    if piece.scale is not None:
        factor = piece.scale.to(device=out.device, dtype=torch.promote_types(out.dtype, torch.float32))
        out = (out * factor.reshape(-1, *[1] * (out.dim() - 1))).to(out.dtype)
    return _like(out, tensor)


def _like(out: Tensor, tensor: Tensor) -> Tensor:
    """``out`` with its dims in memory in the order of ``tensor``'s."""
    order = memory_order(tensor)
    if order == list(range(tensor.dim())):
        return out.contiguous()
    back = [order.index(d) for d in range(len(order))]
    return out.permute(order).contiguous().permute(back)


def memory_order(tensor: Tensor) -> list[int]:
    """The tensor's dims from the slowest to the fastest in memory. Plain order wherever that is a valid answer."""
    if tensor.is_contiguous():
        return list(range(tensor.dim()))
    strides, sizes = tensor.stride(), tensor.shape
    return sorted(range(tensor.dim()), key=lambda d: (-strides[d], sizes[d] == 1, d))


def empty_like(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uninitialised memory of another shape, its dims in memory in the order of ``tensor``'s."""
    order = memory_order(tensor)
    if order == list(range(len(order))):
        return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    flat = torch.empty([shape[d] for d in order], dtype=tensor.dtype, device=tensor.device)
    return flat.permute([order.index(d) for d in range(len(order))])
