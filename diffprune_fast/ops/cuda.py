"""``slice_channels_`` on CUDA devices, by the extension ``diffprune_fast._cuda``."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import reference, slice_tables
from .slice_channels import Slice

ABI = 3

_cuda: Any
try:
    _cuda = importlib.import_module("diffprune_fast._cuda")
    _missing = ""
except ImportError as error:
    _cuda = None
    _missing = (
        f"the CUDA extension is not built ({error}): DIFFPRUNE_CUDA=1 pip install builds it, with nvcc; "
        "without it, PyTorch's index_select slices on GPUs"
    )
else:
    if getattr(_cuda, "ABI", 0) != ABI or _cuda.GATHER_ENTRY != slice_tables.ENTRY:
        _missing = "the CUDA extension was built from older sources: DIFFPRUNE_CUDA=1 pip install -e . builds it anew"


def availability() -> str:
    """``"ok"``, or why the extension can't serve."""
    if _missing:
        return _missing
    return "ok" if torch.cuda.is_available() else "the CUDA extension is built, but PyTorch sees no CUDA device"


@torch.no_grad()
def slice_channels_(tensors: Sequence[Tensor], slices: Sequence[Slice]) -> None:
    """As :func:`diffprune_fast.ops.slice_channels_`, without its checks; all tensors on one device.

    What stays is gathered into new memory on the caller's current stream, some tensors at a time: with never more new
    memory than the largest tensor has, after which their old memory goes back. Nothing waits for the device, unless
    index tables lie on it. Tensors that the kernel can't slice (more than two sliced dims, or integers with a scale)
    are sliced by the reference. Where memory runs out half-way, every tensor is either sliced or untouched.
    """
    device = tensors[0].device
    with torch.cuda.device(device):
        tables = slice_tables.build(tensors, slices, _cuda.fill_table)
        stream = torch.cuda.current_stream()
        room = max(t.numel() * t.element_size() for t in tensors)
        torch.empty(room, dtype=torch.uint8, device=device)  # where there is too little memory, nothing has changed yet
        prepared = prepare(tables, device)
        for batch in batches(tensors, tables, room - prepared.nbytes):
            targets = [new_memory(tensors[i], tables.shapes[i]) for i in batch]
            aim(prepared, batch, targets)
            launch(prepared, batch)
            for i, target in zip(batch, targets):
                # the kernel may still be at work when the old memory goes back to the stream that it was taken on
                tensors[i].record_stream(stream)
                tensors[i].data = target
        for i in np.flatnonzero(tables.tiles < 0).tolist():
            reference.slice_channels_([tensors[i]], [slices[i]])


@dataclass
class Prepared:
    """Tables and their copies on the device, where the entries arrive batch by batch with their targets."""

    tables: slice_tables.SliceTables
    host: Tensor
    entries: Tensor
    tile_entry: Tensor
    alive: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """On the device."""
        return sum(t.nbytes for t in (self.entries, self.tile_entry, *self.alive))


def prepare(tables: slice_tables.SliceTables, device: torch.device) -> Prepared:
    """Upload what is the same for all batches on the current stream, by copies that the host doesn't wait for."""
    indices = _put(tables.indices, device)
    scales = [scale.to(device, non_blocking=True) for _, scale in tables.scales]
    tables.place(indices.data_ptr(), [s.data_ptr() for s in scales])
    rows = torch.from_numpy(tables.entries.view(np.int64).reshape(len(tables.entries), -1))
    host = rows.pin_memory()
    tile_entry = _put(tables.tile_entry, device)
    return Prepared(tables, host, torch.empty_like(rows, device=device), tile_entry, (indices, *scales))


def batches(tensors: Sequence[Tensor], tables: slice_tables.SliceTables, room: int) -> Iterator[range]:
    """Positions of neighbouring tensors that the kernel slices, whose new memory is at most ``room`` bytes together."""
    begin, used = 0, 0
    for i, (shape, tiles) in enumerate(zip(tables.shapes, tables.tiles.tolist())):
        size = math.prod(shape) * tensors[i].element_size()
        if tiles <= 0 or used + size > room:
            if begin < i:
                yield range(begin, i)
            begin, used = i, 0
        if tiles <= 0:
            begin = i + 1
        else:
            used += size
    if begin < len(tensors):
        yield range(begin, len(tensors))


def new_memory(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tensor.is_contiguous():
        return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    return reference.empty_like(tensor, shape)


def aim(prepared: Prepared, batch: range, targets: Sequence[Tensor]) -> None:
    """Tell the device where a batch goes, on the current stream."""
    rows, place = slice(batch.start, batch.stop), slice_tables.FIELDS.index("target")
    prepared.host[rows, place] = torch.tensor([t.data_ptr() for t in targets])
    prepared.entries[rows].copy_(prepared.host[rows], non_blocking=True)


def launch(prepared: Prepared, batch: range) -> None:
    """Gather a batch to where it was aimed, on the current stream. Returns at once."""
    tables, stream = prepared.tables, torch.cuda.current_stream()
    _cuda.slice_channels(
        entries=prepared.entries.data_ptr(),
        tile_entry=prepared.tile_entry.data_ptr(),
        first=int(tables.entries["first_tile"][batch.start]),
        tiles=int(tables.tiles[batch.start : batch.stop].clip(0).sum()),
        device=stream.device_index,
        stream=stream.cuda_stream,
    )


def _put(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values).pin_memory().to(device, non_blocking=True)
