"""Both operations on the CPU, by the C++ extension ``diffprune_fast._cpu``: tensors become pointers here."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import reference
from .channel_scores import CRITERIA, DTYPES, ScoreTable
from .slice_channels import Slice, Step, known_references, set_data, sliced_shape

ABI = 4

_cpu: Any
try:
    _cpu = importlib.import_module("diffprune_fast._cpu")
    _missing = ""
except ImportError as error:
    _cpu = None
    _missing = f"the C++ extension is not built ({error}): pip install -e . builds it"
else:
    if getattr(_cpu, "ABI", 0) != ABI:
        _missing = "the C++ extension was built from older sources: pip install -e . builds it anew"

# The C++ enum Dtype.
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def availability() -> str:
    """``"ok"``, or why the extension can't serve."""
    return _missing or "ok"


def simd() -> str:
    """The instruction set in use, for example ``"AVX-512"``."""
    return _cpu.simd() if _cpu is not None else "none"


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
    stacked = timestep_weights is not None
    reads = grads is not None and criterion != "magnitude"
    thetas, strides = list(thetas), []
    pass_grads = list(grads) if grads is not None and reads else []
    copied = []
    for i, theta in enumerate(thetas):
        steps = _strides(theta, table.entries[i].shape)
        if steps is None or (reads and not _same_layout(pass_grads[i], theta, stacked)):
            thetas[i] = theta.contiguous()
            steps = table.entries[i].shape[2], 1
            if reads:
                copied.append(i)
                pass_grads[i] = pass_grads[i].contiguous()
        strides.append(steps)
    if not thetas:
        return scores
    # bytes, because NumPy copies rows with gaps between their fields one field after the other
    entries = np.frombuffer(bytearray(table.cached("cpu", lambda: _static(table))[0]), _cpu.SCORE_ENTRY)
    entries["theta"] = [t.data_ptr() for t in thetas]
    entries["dtype"] = [_DTYPE_CODES[t.dtype] for t in thetas]
    entries["inner_stride"], entries["trailing_stride"] = zip(*strides)
    if reads:
        entries["grad"] = [g.data_ptr() for g in pass_grads]
    _cpu.channel_scores(
        scores.data_ptr(),
        scores.dtype == torch.float64,
        entries,
        CRITERIA.index(criterion),
        timestep_weights.detach().double().cpu().numpy() if timestep_weights is not None and reads else None,
        zero_grad and reads,
        torch.get_num_threads(),
    )
    if zero_grad and grads is not None:
        for i in copied if reads else range(len(grads)):
            grads[i].zero_()
    return scores


def _strides(theta: Tensor, shape: tuple[int, int, int]) -> tuple[int, int] | None:
    """Of the inner and the trailing index; None if the tensor has to be copied first."""
    outer, inner, trailing = shape
    if theta.is_contiguous():
        return trailing, 1
    if _is_channels_last(theta) and tuple(theta.shape[:2]) == (outer, inner):
        return 1, inner
    return None


def _is_channels_last(tensor: Tensor) -> bool:
    if tensor.dim() == 4:
        return tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.dim() == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d)


def _same_layout(grad: Tensor, theta: Tensor, stacked: bool) -> bool:
    if stacked:
        if grad.shape[0] > 1 and grad.stride(0) != theta.numel():
            return False
        grad = grad[0]
    return grad.is_contiguous() if theta.is_contiguous() else _is_channels_last(grad)


def _static(table: ScoreTable) -> tuple[bytes, list[Tensor]]:
    """The C++ table as far as it is the same in every call, and what keeps the index tables in it alive."""
    alive: list[Tensor] = []

    def address(units: Tensor | None) -> int:
        if units is None:
            return 0
        alive.append(units.detach().cpu().contiguous())
        return alive[-1].data_ptr()

    rows = []
    for entry in table.entries:
        outer, inner, trailing = entry.shape
        rows.append(
            {
                "outer": outer,
                "inner": inner,
                "trailing": trailing,
                "row_units": address(entry.row_units),
                "col_units": address(entry.col_units),
                "weight": entry.weight,
                **dict.fromkeys(("theta", "grad", "dtype", "inner_stride", "trailing_stride"), 0),  # the call's
            }
        )
    return _rows(rows, _cpu.SCORE_ENTRY).tobytes(), alive


def _rows(rows: Sequence[Mapping[str, float]], dtype: np.dtype) -> np.ndarray:
    """A table for C++. Raises KeyError for a field of the C++ struct that a row lacks."""
    in_order = itemgetter(*(dtype.names or ()))
    return np.array([in_order(row) for row in rows], dtype)


@torch.no_grad()
def slice_channels_(tensors: Sequence[Tensor], slices: Sequence[Slice]) -> None:
    """As :func:`diffprune_fast.ops.slice_channels_`, without its checks."""
    for step in slice_steps(tensors, slices):
        step()


@torch.no_grad()
def slice_steps(tensors: Sequence[Tensor], slices: Sequence[Slice]) -> list[Step]:
    """As :func:`diffprune_fast.ops.slice_channels.slice_steps`.

    Tensors that own their memory are compacted within it, and what lies behind them goes back to the system; the
    others, and biases and the like, get new memory. The first step moves all channels, in one call of C++ that fails
    before it begins or not at all; the next ones give the tensors their new data; the last ones let go of memory, and
    do no harm where they fail.
    """
    alive: list[Tensor] = []
    rows: list[dict[str, int]] = []
    data: list[Step] = []
    rest: list[Step] = []
    references = known_references(tensors)
    for tensor, piece in zip(tensors, slices):
        shape = sliced_shape(tensor, piece)
        if piece.scale is None and shape == tuple(tensor.shape):
            continue
        order = reference.memory_order(tensor)
        row = _slice_row(tensor, piece, order, alive)
        if row is None:
            data += set_data(tensor, reference.slice_channels(tensor.detach(), piece))
            continue
        if tensor.nbytes >= min(_SMALL, _LARGE) and _owns_memory(tensor, references[id(tensor)]):
            new, later = _front(tensor, shape, order)
            rest += later
        else:
            new = reference.empty_like(tensor, shape)
        row["target"] = new.data_ptr()
        rows.append(row)
        data += set_data(tensor, new)
    if not rows:
        return data
    table = _rows(rows, _cpu.SLICE_ENTRY)
    move = partial(_cpu.slice_channels, table, torch.get_num_threads())
    move.alive = alive  # type: ignore[attr-defined]  # the table has their addresses
    return [move, *data, *rest]


# From here on, pages are given back; below, their bookkeeping costs more than a copy of what stays. (The UNet of
# CIFAR-10 on an EPYC: 1.4 times as fast as PyTorch with 256 KB, 1.2 times with 1 MB.)
_LARGE = 1 << 18


# Up to here a copy costs less than making a storage smaller: 4.7 ms of 41 for the UNet of CIFAR-10.
_SMALL = 1 << 14


def _owns_memory(tensor: Tensor, references: int) -> bool:
    """Whether the tensor's memory may be overwritten: PyTorch's own, and seen by nobody else.

    Memory that isn't resizable belongs to a file, a NumPy array or another storage. references: those to the tensor in
    C++ that are accounted for; a DLPack capsule is another one. (A graph refers to tensors that require a gradient, but
    those DLPack refuses.)
    """
    storage = tensor.untyped_storage()
    users = getattr(torch._C, "_storage_Use_Count", None)
    if users is None or not storage.resizable() or storage.is_shared():
        return False
    if torch.cuda.is_available() and tensor.is_pinned():
        return False
    if users(storage._cdata) > 2:  # the tensor, and ``storage`` here
        return False
    return tensor.requires_grad or tensor._use_count() <= references  # type: ignore[attr-defined]


def _front(tensor: Tensor, shape: tuple[int, ...], order: Sequence[int]) -> tuple[Tensor, list[Step]]:
    """The first elements of the tensor's memory as a tensor of its own, and the calls that let the others go."""
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= shape[dim]
    size, storage = step * tensor.element_size(), tensor.untyped_storage()
    pages = storage.nbytes() >= _LARGE and _cpu.can_slice_in_place()  # the kernel gives them back
    front = storage[:size] if pages and size < storage.nbytes() else storage
    new = torch.empty(0, dtype=tensor.dtype).set_(front, 0, shape, strides)
    return new, [] if pages else [partial(storage.resize_, size)]


def _slice_row(tensor: Tensor, piece: Slice, order: Sequence[int], alive: list[Tensor]) -> dict[str, int] | None:
    """A ``SliceEntry`` of csrc/slice_channels.h without its target; None where the reference has to serve."""
    if tensor.numel() == 0:
        return None
    shape, kept = tensor.shape, {d: keep.shape[0] for d, keep in piece.keep.items()}
    sizes = [shape[d] for d in order]
    cut = [p for p, d in enumerate(order) if kept.get(d, sizes[p]) < sizes[p]]
    if piece.scale is not None:
        if not order or order[0] != 0 or tensor.dtype not in DTYPES:
            return None
        cut = sorted({0, *cut})
    if len(cut) > 2 or tensor.is_conj() or tensor.is_neg():
        return None
    whole = {position for position in cut if kept.get(order[position], 0) in (0, sizes[position])}
    keeps = [None if position in whole else piece.keep[order[position]] for position in cut]
    while len(cut) < 2:  # a dim of size 1 behind the last one
        cut.append(len(sizes))
        sizes.append(1)
        keeps.append(None)
    a, b = cut
    counts = [sizes[p] if keep is None else kept[order[p]] for p, keep in zip(cut, keeps)]
    scale = dtype = 0
    if piece.scale is not None:
        alive.append(piece.scale.detach().to("cpu", torch.float64).contiguous())
        scale, dtype = alive[-1].data_ptr(), _DTYPE_CODES[tensor.dtype]
    addresses = []
    for keep in keeps:
        if keep is not None:
            alive.append(keep if keep.is_cpu and keep.is_contiguous() else keep.cpu().contiguous())
        addresses.append(alive[-1].data_ptr() if keep is not None else 0)
    return {
        "source": tensor.data_ptr(),
        "target": 0,
        "element_size": tensor.element_size(),
        "pre": math.prod(sizes[:a]),
        "a": sizes[a],
        "mid": math.prod(sizes[a + 1 : b]),
        "b": sizes[b],
        "post": math.prod(sizes[b + 1 :]),
        "keep_a": addresses[0],
        "keep_b": addresses[1],
        "n_keep_a": counts[0],
        "n_keep_b": counts[1],
        "scale": scale,
        "dtype": dtype,
    }
