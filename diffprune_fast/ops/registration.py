"""The operations as ``torch.ops.diffprune_fast.*``, for graphs: schema, fake implementation, dispatch.

``channel_scores_`` mutates its scores (and, with ``zero_grad``, its gradients). Slicing in place changes shapes, which
a graph can't express: ``slice_channels`` is its functional form. :func:`~diffprune_fast.ops.channel_scores_` and
:func:`~diffprune_fast.ops.slice_channels_` don't come through here; both ways end in the same backends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import channel_scores, reference
from .slice_channels import Slice, slice_channels_, sliced_shape


@torch.library.custom_op("diffprune_fast::channel_scores_", mutates_args=("scores", "grads"))
def _channel_scores(
    scores: Tensor,
    thetas: Sequence[Tensor],
    grads: Sequence[Tensor],
    shapes: Sequence[int],
    row_units: Sequence[Tensor],
    col_units: Sequence[Tensor],
    weights: Sequence[float],
    criterion: str,
    timestep_weights: Tensor | None,
    zero_grad: bool,
) -> None:
    """shapes: ``(outer, inner, trailing)`` of all entries in a row. An empty index table is None, empty grads too."""
    entries = [
        channel_scores.ScoreEntry(
            (shapes[3 * i], shapes[3 * i + 1], shapes[3 * i + 2]),
            rows if rows.numel() else None,
            cols if cols.numel() else None,
            weight,
        )
        for i, (rows, cols, weight) in enumerate(zip(row_units, col_units, weights))
    ]
    channel_scores.channel_scores_(
        scores,
        thetas,
        grads if len(grads) else None,
        channel_scores.ScoreTable(entries, scores.numel()),
        criterion=criterion,
        timestep_weights=timestep_weights,
        zero_grad=zero_grad,
    )


@_channel_scores.register_fake
def _(scores, thetas, grads, shapes, row_units, col_units, weights, criterion, timestep_weights, zero_grad) -> None:
    if not len(shapes) // 3 == len(thetas) == len(row_units) == len(col_units) == len(weights):
        raise ValueError("shapes (three per entry), thetas, row_units, col_units and weights must be equally many")


@torch.library.custom_op("diffprune_fast::slice_channels", mutates_args=())
def _slice_channels(tensor: Tensor, dims: Sequence[int], keep: Sequence[Tensor], scale: Tensor | None) -> Tensor:
    """The kept slice as a new tensor. dims and keep: one per sliced dim."""
    out = tensor.detach().clone(memory_format=torch.preserve_format)
    slice_channels_([out], [Slice(dict(zip(dims, keep)), scale)])
    return out


@_slice_channels.register_fake
def _(tensor: Tensor, dims: Sequence[int], keep: Sequence[Tensor], scale: Tensor | None) -> Tensor:
    shape = sliced_shape(tensor, Slice(dict(zip(dims, keep)), scale))
    return reference.empty_like(tensor, shape)
