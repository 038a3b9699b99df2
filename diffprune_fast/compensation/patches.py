"""The inputs of a layer as rows of a matrix, gathered where they are wanted: nothing is unfolded as a whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..architectures.layers import CONVOLUTIONS

NORMS = (nn.GroupNorm, nn.LayerNorm)
# What one chunk of rows may take: large enough for the matrix products to run at full speed.
CHUNK_BYTES = 64 << 20


def positions_of(layer: nn.Module, x: Tensor) -> tuple[int, ...]:
    """The sizes of the places that ``layer`` answers at: all dims of its output but the channels'."""
    if isinstance(layer, nn.GroupNorm):
        return (x.shape[0], *x.shape[2:])
    if not isinstance(layer, CONVOLUTIONS):
        return tuple(x.shape[:-1])
    x = batched(layer, x)
    space = []
    for i, (low, high) in enumerate(_paddings(layer)):
        reach = layer.dilation[i] * (layer.kernel_size[i] - 1) + 1
        space.append((x.shape[2 + i] + low + high - reach) // layer.stride[i] + 1)
    return (len(x), *space)


def channel_dim(layer: nn.Module) -> int:
    """Where a layer's inputs and outputs, with their batch dim, have their channels."""
    return 1 if isinstance(layer, (*CONVOLUTIONS, nn.GroupNorm)) else -1


def batched(layer: nn.Module, x: Tensor) -> Tensor:
    """A convolution's input or output with its batch dim, which one sample may lack."""
    sample = isinstance(layer, CONVOLUTIONS) and x.ndim == len(layer.kernel_size) + 1
    return x.unsqueeze(0) if sample else x


def values_at(layer: nn.Module, x: Tensor, rows: Tensor, channels: Tensor | None = None) -> Tensor:
    """``(rows, channels)`` of a layer's input or output ``x`` at flat positions ``rows`` of its own places."""
    return rows_of(batched(layer, x), channel_dim(layer), rows, channels)


def rows_of(x: Tensor, dim: int, rows: Tensor, channels: Tensor | None = None) -> Tensor:
    """``(rows, channels)`` of a tensor whose channels are along ``dim``, at flat positions of its other dims."""
    x, rows = x.movedim(dim, -1), rows.to(x.device)
    if x.is_contiguous():
        found = x.reshape(-1, x.shape[-1]).index_select(0, rows)
    else:
        found = x[torch.unravel_index(rows, x.shape[:-1])]
    return found if channels is None else found.index_select(1, channels.to(x.device))


class Patches:
    """Row ``i``: the numbers of ``x`` that the layer's answer at flat position ``rows[i]`` is a combination of.

    layer: a linear layer or a convolution. x: its input. rows: ``(n,)`` int64 positions, on any device.
    columns: the number of them per group, kernel positions first, channels last. groups: the convolution's.
    """

    def __init__(self, layer: nn.Module, x: Tensor, rows: Tensor, dtype: torch.dtype) -> None:
        rows = rows.to(x.device)
        self.groups = layer.groups if isinstance(layer, CONVOLUTIONS) else 1
        if isinstance(layer, CONVOLUTIONS):
            self._table, self._base, self._taps = _convolution(layer, batched(layer, x), rows)
        else:
            self._table, self._base = x.reshape(-1, x.shape[-1]), rows
            self._taps = torch.zeros(1, dtype=torch.int64, device=x.device)
        self.channels = self._table.shape[1]
        self.columns = len(self._taps) * self.channels // self.groups
        self.dtype = dtype

    def __len__(self) -> int:
        return len(self._base)

    def sums(self) -> Tensor:
        """``(channels,)`` sums over about as many places as there are rows: where to shift the rows to."""
        step = max(1, len(self._table) // max(1, len(self._base)))
        return self._table[::step].to(self.dtype).mean(0) * len(self._base)

    def spread(self, per_channel: Tensor) -> Tensor:
        """``(groups, columns)`` of a value per channel: the same at all kernel positions."""
        return self._grouped(per_channel.view(1, 1, -1).expand(1, len(self._taps), -1)).squeeze(1)

    def chunk(self, start: int, stop: int) -> Tensor:
        """``(groups, stop - start, columns)``: some of the rows."""
        where = (self._base[start:stop, None] + self._taps).reshape(-1)
        found = self._table.index_select(0, where).to(self.dtype)
        return self._grouped(found.view(-1, len(self._taps), self.channels))

    def _grouped(self, x: Tensor) -> Tensor:
        if self.groups == 1:
            return x.reshape(1, len(x), -1)
        return x.reshape(*x.shape[:2], self.groups, -1).permute(2, 0, 1, 3).reshape(self.groups, len(x), -1)

    def chunk_rows(self) -> int:
        size = torch.finfo(self.dtype).bits // 8
        return max(256, CHUNK_BYTES // (self.columns * self.groups * size))


def matrix_of(weight: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """``(groups, columns, outputs per group)``: a weight as what rows of :class:`Patches` are multiplied by."""
    w = weight.detach().to(dtype).flatten(2) if weight.ndim > 2 else weight.detach().to(dtype).unsqueeze(2)
    out, channels, taps = w.shape
    return w.reshape(groups, out // groups, channels, taps).permute(0, 3, 2, 1).reshape(groups, taps * channels, -1)


def weight_of(matrix: Tensor, like: Tensor) -> Tensor:
    """The way back from :func:`matrix_of`, with the shape, dtype and memory format of ``like``."""
    groups, channels = len(matrix), like.shape[1]
    w = matrix.reshape(groups, -1, channels, matrix.shape[-1]).permute(0, 3, 2, 1)
    return torch.empty_like(like).copy_(w.reshape(like.shape))


def _paddings(layer: Any) -> list[tuple[int, int]]:
    """Per spatial dim: what is added in front and behind."""
    if layer.padding_mode != "zeros":
        flat = layer._reversed_padding_repeated_twice
        return [(flat[i], flat[i + 1]) for i in range(len(flat) - 2, -1, -2)]
    if layer.padding == "valid":
        return [(0, 0)] * len(layer.kernel_size)
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in layer.padding]


def _convolution(layer: Any, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The padded input as a table of channels, the table's row of every position's first corner, and the offsets of the
    kernel's positions from there."""
    shape = positions_of(layer, x)
    flat = [p for pair in reversed(_paddings(layer)) for p in pair]
    if any(flat):
        x = F.pad(x, flat, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    strides = [1]
    for size in reversed(x.shape[3:]):
        strides.insert(0, strides[0] * size)
    where = torch.unravel_index(rows, shape)
    base = where[0] * (strides[0] * x.shape[2])
    taps = torch.zeros(1, dtype=torch.int64, device=x.device)
    for i, stride in enumerate(strides):
        base = base + where[1 + i] * (layer.stride[i] * stride)
        along = torch.arange(layer.kernel_size[i], device=x.device) * (layer.dilation[i] * stride)
        taps = (taps[:, None] + along).reshape(-1)
    return x.movedim(1, -1).reshape(-1, x.shape[1]), base, taps
