"""The tables that the CUDA slicing kernel walks: what stays of every tensor, cut into tiles.

Tensors become arrays of shapes, strides and addresses here; csrc/cuda/slice_table.h makes the entries of them. The
fields and their meaning: ``GatherEntry`` in csrc/cuda/slice_index.h.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .slice_channels import Slice

FIELDS = (
    "source",
    "target",
    "rows",
    "d0",
    "k0",
    "b",
    "source_row",
    "target_row",
    "c",
    "keep0",
    "keep1",
    "log2_unit",
    "log2_width",
    "rows_per_tile",
    "column_tiles",
    "scale",
    "scale_kind",
    "scale_rows",
    "scale_columns",
    "first_tile",
)
ENTRY = np.dtype([(name, np.int64) for name in FIELDS])
SCALE_KINDS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.float64: 4}

# fill_table of csrc/cuda/slice_table.h, by addresses: tensors, how many, dims, keeps, entries, tiles
Fill = Callable[[int, int, int, int, int, int], int]


@dataclass(frozen=True)
class SliceTables:
    """Tables on the host, one entry per tensor.

    shapes: of what stays. entries: ``(n,)`` of ``ENTRY``; index addresses are 1 + the position in ``indices`` (0 for
    none), targets and scales are still to come. tiles: ``(n,)``, 0 where nothing changes, -1 where the kernel can't
    slice. tile_entry: every tile's entry, int32. scales: ``(tensor, factors)``, to be put where the tensors are.
    """

    shapes: list[tuple[int, ...]]
    entries: np.ndarray
    tiles: np.ndarray
    tile_entry: np.ndarray
    indices: np.ndarray
    scales: tuple[tuple[int, Tensor], ...]

    def place(self, index_address: int, scale_addresses: Sequence[int]) -> None:
        """Put real addresses into ``entries``, once indices and scales are on the device."""
        for name in ("keep0", "keep1"):
            column = self.entries[name]
            column[:] = np.where(column > 0, index_address + 4 * (column - 1), 0)
        for (row, _), address in zip(self.scales, scale_addresses):
            self.entries["scale"][row] = address


class _Kept:
    """Kept indices, each table once: callers wrap one NumPy array many times, or give the same tensor to many."""

    def __init__(self) -> None:
        self.values: list[np.ndarray] = []
        self.rows: list[int] = []  # count and 1 + place, one after the other
        self._size = 0
        self._by_name: dict[int, int] = {}
        self._by_memory: dict[tuple[object, ...], int] = {}

    def row(self, keep: Tensor) -> int:
        row = self._by_name.get(id(keep))  # the caller's slices keep it alive, so that no other gets its id
        if row is None:
            memory = keep.device, keep.data_ptr(), keep.numel(), keep.stride()
            row = self._by_memory.setdefault(memory, len(self.values))
            self._by_name[id(keep)] = row
            if row == len(self.values):
                self.values.append(keep.cpu().numpy())
                self.rows += (keep.numel(), self._size + 1)
                self._size += keep.numel()
        return row


def build(tensors: Sequence[Tensor], slices: Sequence[Slice], fill: Fill) -> SliceTables:
    """The tables of these tensors, made by ``fill``."""
    kept, scales = _Kept(), []
    given: list[int] = []
    dims: list[int] = []
    shapes = []
    for i, (tensor, piece) in enumerate(zip(tensors, slices)):
        shape, strides = tensor.shape, tensor.stride()
        kind = factors = 0
        if piece.scale is not None:
            kind, factors = SCALE_KINDS.get(tensor.dtype, -1), piece.scale.shape[0]
            wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
            scales.append((i, piece.scale.detach().to(wide).contiguous()))
        given += (tensor.data_ptr(), tensor.element_size(), len(shape), kind, factors)
        after = list(shape)
        for dim, size in enumerate(shape):
            keep = piece.keep.get(dim)
            if keep is None:
                dims += (size, strides[dim], -1)
            else:
                dims += (size, strides[dim], kept.row(keep))
                after[dim] = keep.shape[0]
        shapes.append(tuple(after))
    entries, tiles = np.zeros(len(shapes), ENTRY), np.zeros(len(shapes), np.int64)
    arrays = [np.array(rows, np.int64) for rows in (given, dims, kept.rows)]
    addresses = [a.ctypes.data for a in (*arrays, entries, tiles)]
    total = fill(addresses[0], len(shapes), *addresses[1:])
    if total >= 2**31:
        raise ValueError(f"{total} tiles are too many for one call: slice fewer tensors at a time")
    return SliceTables(
        shapes=shapes,
        entries=entries,
        tiles=tiles,
        tile_entry=np.repeat(np.arange(len(shapes), dtype=np.int32), np.maximum(tiles, 0)),
        indices=np.concatenate([*kept.values, np.zeros(1, np.int64)]).astype(np.int32),
        scales=tuple(scales),
    )
