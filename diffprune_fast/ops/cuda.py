"""``slice_channels_`` on CUDA devices, in place, by the extension ``diffprune_fast._cuda``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import reference, slice_tables
from .slice_channels import Slice, sliced_shape

ABI = 2

_cuda: Any
try:
    _cuda = importlib.import_module("diffprune_fast._cuda")
    _missing = ""
except ImportError as error:
    _cuda = None
    _missing = (
        f"the CUDA extension is not built ({error}): it is where the package is installed with nvcc on PATH; without "
        "it, PyTorch's index_select slices on GPUs"
    )
else:
    if getattr(_cuda, "ABI", 0) != ABI or _cuda.TILED_ENTRY != slice_tables.ENTRY:
        _missing = "the CUDA extension was built from older sources: pip install -e . builds it anew"


def availability() -> str:
    """``"ok"``, or why the extension can't serve."""
    if _missing:
        return _missing
    return "ok" if torch.cuda.is_available() else "the CUDA extension is built, but PyTorch sees no CUDA device"


@torch.no_grad()
def slice_channels_(tensors: Sequence[Tensor], slices: Sequence[Slice]) -> None:
    """As :func:`diffprune_fast.ops.slice_channels_`, without its checks; all tensors on one device.

    One launch compacts every tensor where it lies, on the caller's current stream; then one tensor after the other
    gives its old memory back, so that never more than the largest tensor is needed on top. Nothing waits for the
    device, unless index tables lie on it. Tensors that the kernel can't slice (more than two sliced dims, or integers
    with a scale) are sliced by the reference.
    """
    tables, left = slice_tables.build(tensors, slices)
    skipped = set(left)
    if len(tables.tile_entry):
        launch(prepare(tables, tensors[0].device))
    for i, (tensor, piece) in enumerate(zip(tensors, slices)):
        if i in skipped:
            reference.slice_channels_([tensor], [piece])
        else:
            shrink(tensor, sliced_shape(tensor, piece))


@dataclass
class Prepared:
    """A table on the device, good for one launch. flags: ticket, tiles that have been read, frontiers; all zero."""

    entries: Tensor
    tile_entry: Tensor
    flags: Tensor
    alive: tuple[Tensor, ...]


def prepare(tables: slice_tables.SliceTables, device: torch.device) -> Prepared:
    """Upload the tables on the current stream, by copies that the host doesn't wait for."""
    indices = _put(tables.indices, device)
    scales = [scale.to(device, non_blocking=True) for _, scale in tables.scales]
    placed = tables.placed(indices.data_ptr(), [s.data_ptr() for s in scales])
    entries = _put(placed.view(np.int64).reshape(len(placed), -1), device)  # PyTorch has no rows with named fields
    tile_entry = _put(tables.tile_entry, device)
    flags = torch.zeros(1 + len(tile_entry) + len(entries), dtype=torch.int32, device=device)
    return Prepared(entries, tile_entry, flags, (indices, *scales))


def launch(prepared: Prepared) -> None:
    """Compact every tensor of the table where it lies, on the current stream. Returns at once."""
    stream = torch.cuda.current_stream(prepared.flags.device)
    tiles = len(prepared.tile_entry)
    _cuda.slice_channels(
        entries=prepared.entries.data_ptr(),
        tile_entry=prepared.tile_entry.data_ptr(),
        tiles=tiles,
        ticket=prepared.flags.data_ptr(),
        read=prepared.flags[1:].data_ptr(),
        frontier=prepared.flags[1 + tiles :].data_ptr(),
        device=stream.device_index,
        stream=stream.cuda_stream,
    )


def _put(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values).pin_memory().to(device, non_blocking=True)


def shrink(tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Give a tensor whose first elements in memory are its slice the slice's shape, and its other memory back."""
    if shape == tuple(tensor.shape):
        return
    strides, step = [0] * tensor.dim(), 1
    for dim in reversed(reference.memory_order(tensor)):
        strides[dim], step = step, step * shape[dim]
    compact = tensor.detach().as_strided(shape, strides)
    storage = tensor.untyped_storage()
    if tensor.is_cuda and torch.cuda.current_stream(tensor.device) != torch.cuda.default_stream(tensor.device):
        # the kernel may still be at work when the old memory goes back to the stream that it was taken on
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    if storage.resizable():
        tensor.data = compact
        storage.resize_(step * tensor.element_size())
    else:
        tensor.data = compact.clone(memory_format=torch.preserve_format)
