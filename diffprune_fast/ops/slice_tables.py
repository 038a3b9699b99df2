"""The tables that the CUDA slicing kernel walks: how tensors are cut into tiles.

The fields and their meaning: ``TiledEntry`` in csrc/cuda/slice_index.h.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

from .reference import memory_order
from .slice_channels import Slice, sliced_shape

FIELDS = (
    "address",
    "bytes",
    "log2_element",
    "rows",
    "d0",
    "k0",
    "b",
    "d1",
    "k1",
    "c",
    "keep0",
    "rank0",
    "keep1",
    "cuts",
    "rows_per_tile",
    "segments",
    "segment_width",
    "scale",
    "scale_kind",
    "scale_period",
    "first_tile",
    "tiles",
    "straight",
    "reserved",
)
ENTRY = np.dtype([(name, np.int64) for name in FIELDS])
STAGE_BYTES = 16 * 1024
MAX_ROWS = 256
VECTOR = 16
# A single kept dim whose indices are at least this long is copied row by row, a shorter one element by element.
ROW_BYTES = 64
SCALE_KINDS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.float64: 4}
_POINTERS = ("keep0", "rank0", "keep1", "cuts")


@dataclass(frozen=True)
class SliceTables:
    """Tables on the host. Index addresses in ``entries`` are 1 + the position in ``indices``, 0 for none.

    entries: ``(n,)`` of ``ENTRY``. indices: int32. tile_entry: ``(tiles,)`` int32. scales: ``(entry, factors)``, which
    have to be put where the tensors are.
    """

    entries: np.ndarray
    indices: np.ndarray
    tile_entry: np.ndarray
    scales: tuple[tuple[int, Tensor], ...]

    def placed(self, index_address: int, scale_addresses: Sequence[int]) -> np.ndarray:
        """``entries`` with real addresses, once indices and scales are on the device."""
        entries = self.entries.copy()
        for name in _POINTERS:
            column = entries[name]
            column[:] = np.where(column > 0, index_address + 4 * (column - 1), 0)
        for (row, _), address in zip(self.scales, scale_addresses):
            entries["scale"][row] = address
        return entries


@dataclass(frozen=True)
class Geometry:
    """A tensor in memory order, as ``(a, d0, b, d1, c)``; which of d0 and d1 lose indices, and to which dim's keep."""

    rows: int
    d0: int
    k0: int
    b: int
    d1: int
    k1: int
    c: int
    keep0: Tensor | None
    keep1: Tensor | None


def geometry(tensor: Tensor, piece: Slice) -> Geometry | None:
    """How the kernel sees a tensor; None if it can't slice it (more than two dims, or a row that has no order)."""
    order = memory_order(tensor)
    sizes = [tensor.shape[d] for d in order]
    kept = [(p, piece.keep[d]) for p, d in enumerate(order) if d in piece.keep and len(piece.keep[d]) < tensor.shape[d]]
    if len(kept) > 2 or tensor.numel() == 0:
        return None
    if piece.scale is not None and order[0] != 0 and tensor.shape[0] != 1:
        return None
    if not kept:
        return Geometry(sizes[0] if sizes else 1, 1, 1, 1, math.prod(sizes[1:]), math.prod(sizes[1:]), 1, None, None)
    p, keep = kept[-1]
    before, n, after = math.prod(sizes[:p]), sizes[p], math.prod(sizes[p + 1 :])
    if len(kept) == 1:
        if after * tensor.element_size() >= ROW_BYTES:
            return Geometry(before * len(keep), n, len(keep), 1, after, after, 1, keep, None)
        return Geometry(before, 1, 1, 1, n, len(keep), after, None, keep)
    q, first = kept[0]
    b = math.prod(sizes[q + 1 : p])
    rows = math.prod(sizes[:q]) * len(first) * b
    return Geometry(rows, sizes[q], len(first), b, n, len(keep), after, first, keep)


def tiling(g: Geometry, element: int, straight: bool) -> tuple[int, int, int] | None:
    """Rows per tile, segments per row and segment width; None if one index of d1 is more than a tile can hold."""
    room = STAGE_BYTES if straight else STAGE_BYTES - 2 * (VECTOR - 1)
    row = g.d1 * g.c * element
    if row <= room:
        slot = row if straight else (row + 2 * (VECTOR - 1)) // VECTOR * VECTOR
        return max(1, min(MAX_ROWS, STAGE_BYTES // slot, g.rows)), 1, g.d1
    most = room // (g.c * element)
    if most == 0:
        return None
    width = -(-g.d1 // -(-g.d1 // most))
    if straight:
        width = -(-width * element // VECTOR) * VECTOR // element
    return 1, -(-g.d1 // width), width


class TableBuilder:
    """Collects entries; index tables that several tensors share are stored once."""

    def __init__(self) -> None:
        self.rows: list[dict[str, int]] = []
        self.scales: list[tuple[int, Tensor]] = []
        self._indices: list[np.ndarray] = []
        self._size = 0
        self._known: dict[tuple[object, ...], int] = {}
        self._alive: list[Tensor] = []  # an address is only a key while its tensor lives
        self._tiles = 0

    def add(self, tensor: Tensor, piece: Slice) -> bool:
        """Add a tensor; False if the kernel can't slice it."""
        element = tensor.element_size()
        if piece.scale is None and sliced_shape(tensor, piece) == tuple(tensor.shape):
            return True
        g = geometry(tensor, piece)
        if g is None or element not in (1, 2, 4, 8, 16) or g.rows >= 2**31 or g.d1 * g.c >= 2**31:
            return False
        if piece.scale is not None and tensor.dtype not in SCALE_KINDS:
            return False
        straight = (
            g.keep1 is None
            and piece.scale is None
            and g.d1 * g.c * element % VECTOR == 0
            and tensor.data_ptr() % VECTOR == 0
        )
        cut = tiling(g, element, straight)
        if cut is None:
            return False
        rows_per_tile, segments, width = cut
        tiles = g.rows * segments if segments > 1 else -(-g.rows // rows_per_tile)
        row = dict.fromkeys(FIELDS, 0)
        row.update(address=tensor.data_ptr(), bytes=tensor.numel() * element, log2_element=element.bit_length() - 1)
        row.update(rows=g.rows, d0=g.d0, k0=g.k0, b=g.b, d1=g.d1, k1=g.k1, c=g.c)
        row.update(rows_per_tile=rows_per_tile, segments=segments, segment_width=width, straight=int(straight))
        row.update(first_tile=self._tiles, tiles=tiles)
        if g.keep0 is not None:
            row["keep0"] = self._kept(g.keep0)
            row["rank0"] = self._cuts(g.keep0, g.d0, 1)
        if g.keep1 is not None:
            row["keep1"] = self._kept(g.keep1)
            row["cuts"] = self._cuts(g.keep1, segments, width)
        if piece.scale is not None:
            wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
            self.scales.append((len(self.rows), piece.scale.detach().to(wide).contiguous()))
            row["scale_kind"] = SCALE_KINDS[tensor.dtype]
            row["scale_period"] = g.rows * g.k1 * g.c // len(piece.scale)
        self.rows.append(row)
        self._tiles += tiles
        return True

    def finish(self) -> SliceTables:
        in_order = itemgetter(*FIELDS)
        entries = np.array([in_order(row) for row in self.rows], ENTRY)
        return SliceTables(
            entries=entries,
            indices=np.concatenate([*self._indices, np.zeros(1, np.int32)]),
            tile_entry=np.repeat(np.arange(len(self.rows), dtype=np.int32), entries["tiles"]),
            scales=tuple(self.scales),
        )

    def _kept(self, keep: Tensor) -> int:
        return self._store(("kept", *_identity(keep)), keep, lambda kept: kept)

    def _cuts(self, keep: Tensor, n: int, width: int) -> int:
        """Where ``width`` times 0, 1, ..., ``n`` would stand among the kept indices."""
        edges = np.arange(n + 1, dtype=np.int64) * width
        return self._store(("cuts", *_identity(keep), n, width), keep, lambda kept: np.searchsorted(kept, edges))

    def _store(self, key: tuple[object, ...], keep: Tensor, make: Callable[[np.ndarray], np.ndarray]) -> int:
        if key not in self._known:
            self._alive.append(keep)
            values = make(keep.cpu().numpy()).astype(np.int32)
            self._known[key] = self._size + 1
            self._indices.append(values)
            self._size += len(values)
        return self._known[key]


def _identity(keep: Tensor) -> tuple[object, ...]:
    """Tensors over the same memory are the same table: callers wrap one NumPy array many times."""
    return keep.device, keep.data_ptr(), keep.numel(), keep.stride()


def build(tensors: Sequence[Tensor], slices: Sequence[Slice]) -> tuple[SliceTables, list[int]]:
    """The tables, and the tensors (by position) that the kernel can't slice."""
    builder = TableBuilder()
    left = [i for i, (tensor, piece) in enumerate(zip(tensors, slices)) if not builder.add(tensor, piece)]
    tables = builder.finish()
    if len(tables.tile_entry) >= 2**31:
        raise ValueError(f"{len(tables.tile_entry)} tiles are too many for one call: slice fewer tensors at a time")
    return tables, left
