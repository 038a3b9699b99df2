"""The tables that ``channel_scores_`` walks on the device: built once per table and memory layout, then reused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Rows and columns of the block that a program holds in registers. Columns: one warp's 16-byte accesses, so that a row
# is summed by shuffles alone; 4096 elements: 16 accesses in flight per thread of 128.
BLOCKS = {
    torch.float32: (32, 128),
    torch.bfloat16: (16, 256),
    torch.float16: (16, 256),
    torch.float64: (16, 64),
}
SUM_BLOCK = 128
UNIT_BLOCK = 32
# Rows of an item: more means fewer partial sums, less means a more even split.
ROWS_PER_ITEM = (32, 256)
# What an item costs besides its elements, in elements: its tables and its first accesses are waited for. By a model of
# the list scheduling of 528 programs, the longest program takes 1.48 (CIFAR), 1.12 (SD-1.5) times the ideal without it
# and 1.12, 1.07 with it; not measured.
ITEM_ELEMENTS = 4096
# Address tables kept per layout: gradients that the allocator hands out again come back at a few addresses.
REMEMBERED = 8


def block_shape(dtype: torch.dtype, stacked: bool, same_order: bool) -> tuple[int, int]:
    """Rows and columns that a program works on at a time.

    Fewer rows for stacked gradients (their sum over timesteps needs registers of its own) and for gradients in another
    memory order (their addresses do): with all of them the compiler spills registers.
    """
    rows, cols = BLOCKS[dtype]
    if same_order:
        return (8 if stacked else rows), cols
    return rows // (8 if stacked else 2), cols


@dataclass(frozen=True)
class View:
    """How one entry is walked: a matrix in memory order, and where its sums go.

    transposed: a single column is walked as a single row. theta_last, grad_last: channels_last in memory.
    """

    rows: int
    cols: int
    transposed: bool
    theta_last: bool
    grad_last: bool


@dataclass
class Tables:
    """One launch's tables: all entries of one dtype."""

    dtype: torch.dtype
    entries: tuple[int, ...]
    layouts: Tensor
    items: Tensor
    starts: Tensor
    n_programs: int
    rows_per_item: int
    same_order: bool
    partials: Tensor
    streams: Tensor
    weights: Tensor
    blocks: Tensor
    n_blocks: int
    sums: Tensor
    can_align: np.ndarray
    tensors: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass
class Launch:
    """Everything for one call.

    copies: tensors that were copied because of their memory order, kept until the next call. copied: the entries whose
    gradients were. spare: memory for the addresses of a call that is captured, host and device. launched: the kernels'
    variants that have run, and so are on the device.
    """

    parts: list[Tables]
    n_sums: int
    sums: Tensor
    first: Tensor
    order: Tensor
    addresses: OrderedDict[tuple[Any, ...], list[Tensor]] = field(default_factory=OrderedDict)
    captured: list[Any] = field(default_factory=list)
    spare: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    launched: set[tuple[Any, ...]] = field(default_factory=set)
    copied: tuple[int, ...] = ()
    copies: tuple[Tensor, ...] = ()


def prepare(
    table: Any,
    thetas: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
    stacked: bool,
    device: torch.device,
    n_programs: int,
) -> Launch:
    """The launch for these tensors, its addresses up to date."""
    launches: dict[Any, Launch] = table.cached(("triton", device), dict)
    key = (
        stacked,
        tuple((t.dtype, t.shape, t.stride()) for t in thetas),
        None if grads is None else tuple(g.stride() for g in grads),
    )
    copied: list[int] = []
    given = [*thetas, *(grads or ())]
    thetas, grads = list(thetas), None if grads is None else list(grads)
    launch = launches.get(key)
    orders = [_in_order(i, table.entries[i], thetas, grads, stacked, copied) for i in range(len(thetas))]
    if launch is None:
        if capturing(device):
            raise RuntimeError(
                "channel_scores_: these tensors' tables aren't on the device yet, and uploading them can't be "
                "captured in a CUDA graph: call it once with tensors of the same shapes before the capture"
            )
        launch = launches[key] = _build(table, thetas, orders, device, n_programs)
    launch.copied = tuple(copied)
    launch.copies = tuple(t for t, old in zip([*thetas, *(grads or ())], given) if t is not old)
    _update_addresses(launch, thetas, grads, stacked, device)
    return launch


def _in_order(
    i: int, entry: Any, thetas: list[Tensor], grads: list[Tensor] | None, stacked: bool, copied: list[int]
) -> tuple[bool, bool]:
    """Whether entry ``i``'s parameter and gradient are channels_last; other memory orders are made contiguous."""
    theta_last = _channels_last(thetas[i], entry.shape)
    if theta_last is None:
        thetas[i], theta_last = thetas[i].contiguous(), False
    if grads is None:
        return theta_last, theta_last
    grad = grads[i][0] if stacked else grads[i]
    grad_last = _channels_last(grad, entry.shape)
    if grad_last is None:
        grads[i], grad_last = grads[i].contiguous(), False
        copied.append(i)
    return theta_last, grad_last


def _channels_last(tensor: Tensor, shape: tuple[int, int, int]) -> bool | None:
    """False: contiguous; True: channels_last (outer, trailing, inner in memory); None: neither."""
    if tensor.is_contiguous():
        return False
    if tuple(tensor.shape[:2]) != shape[:2]:
        return None
    return True if tensor.movedim(1, -1).is_contiguous() else None


def _build(
    table: Any, thetas: Sequence[Tensor], orders: list[tuple[bool, bool]], device: torch.device, n_programs: int
) -> Launch:
    views = [_view(e.shape, *o) for e, o in zip(table.entries, orders)]
    units: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    n_sums = 0
    drafts = []
    for dtype in dict.fromkeys(t.dtype for t in thetas):
        mine = [i for i, t in enumerate(thetas) if t.dtype == dtype]
        draft = _Draft(dtype, n_sums)
        draft.add(table.entries, views, mine, n_programs)
        n_sums = draft.n_sums
        units += draft.units
        positions += draft.positions
        drafts.append((draft, mine))
    sums = torch.empty(max(n_sums, 1), dtype=torch.float64, device=device)
    parts = [d.upload(views, mine, sums, device, n_programs) for d, mine in drafts]
    unit = np.concatenate([*units, np.zeros(0, np.int64)])
    position = np.concatenate([*positions, np.zeros(0, np.int64)])
    order = position[np.argsort(unit, kind="stable")]
    first = np.concatenate([[0], np.cumsum(np.bincount(unit, minlength=table.n_units))])
    return Launch(
        parts=parts,
        n_sums=len(order),
        sums=sums,
        first=torch.from_numpy(first.astype(np.int64)).to(device),
        order=torch.from_numpy(order.astype(np.int64)).to(device),
    )


def _view(shape: tuple[int, int, int], theta_last: bool, grad_last: bool) -> View:
    outer, inner, trailing = shape
    if inner * trailing == 1:
        return View(1, outer, True, False, False)
    if inner == 1 or trailing == 1:
        theta_last = grad_last = False
    return View(outer, inner * trailing, False, theta_last, grad_last)


class _Draft:
    """One dtype's tables while they are being made, in NumPy."""

    def __init__(self, dtype: torch.dtype, n_sums: int) -> None:
        self.dtype = dtype
        self.n_sums = n_sums
        self.units: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.layouts: list[list[int]] = []
        self.items: list[np.ndarray] = []
        self.sizes: list[np.ndarray] = []
        self.streams: list[list[int]] = []
        self.weights: list[float] = []
        self.n_partials = 0
        self.rows_per_item = ROWS_PER_ITEM[0]

    def add(self, entries: Sequence[Any], views: Sequence[View], mine: Sequence[int], n_programs: int) -> None:
        block_rows, block_cols = BLOCKS[self.dtype]
        elements = sum(views[i].rows * views[i].cols for i in mine)
        self.rows_per_item, most = max(ROWS_PER_ITEM[0], block_rows), ROWS_PER_ITEM[1]
        while self.rows_per_item < most and elements > 8 * n_programs * self.rows_per_item * block_cols:
            self.rows_per_item *= 2
        for n, i in enumerate(mine):
            view = views[i]
            row_tiles = -(-view.rows // self.rows_per_item)
            col_tiles = -(-view.cols // block_cols)
            row_base, col_base = self._streams(entries[i], view, row_tiles, col_tiles)
            _, inner, trailing = entries[i].shape
            # column j of a contiguous parameter is (j // trailing, j % trailing), of a channels_last one
            # (j % inner, j // inner); the gradient's column of the same element, if it lies the other way round
            period, stride = (inner, trailing) if view.theta_last else (trailing, inner)
            if view.theta_last == view.grad_last:
                period, stride = 1, 1
            self.layouts.append([view.rows, view.cols, row_base, col_base, period, stride])
            r, c = np.divmod(np.arange(row_tiles * col_tiles), col_tiles)
            self.items.append(np.stack([np.full_like(r, n), r, c], axis=1))
            heights = np.minimum(self.rows_per_item, view.rows - r * self.rows_per_item)
            self.sizes.append(heights * np.minimum(block_cols, view.cols - c * block_cols) + ITEM_ELEMENTS)

    def _streams(self, entry: Any, view: View, row_tiles: int, col_tiles: int) -> tuple[int, int]:
        """Room for an entry's partial sums; -1 where no unit wants them."""
        outer, inner, trailing = entry.shape
        of_rows, of_cols = entry.row_units, entry.col_units
        if view.transposed:
            of_rows, of_cols, inner = of_cols, of_rows, outer
        row_base = col_base = -1
        if of_rows is not None:
            row_base = self._stream(of_rows, (view.rows, col_tiles, view.rows, 1, 0, 1), entry.weight)
            self.n_partials += view.rows * col_tiles
        if of_cols is not None:
            within = (1, trailing) if not view.theta_last else (inner, 1)
            loops = (inner, row_tiles, view.cols, trailing, *within)
            col_base = self._stream(of_cols, loops, entry.weight)
            self.n_partials += view.cols * row_tiles
        return row_base, col_base

    def _stream(self, units: Tensor, loops: tuple[int, ...], weight: float) -> int:
        count, n_slow, slow, n_fast, fast, per_channel = loops
        base = self.n_partials
        self.streams.append([count, base, n_slow, slow, n_fast, fast, per_channel, self.n_sums])
        self.weights.append(weight)
        unit = units.cpu().numpy().astype(np.int64)
        kept = np.flatnonzero(unit >= 0)
        self.units.append(unit[kept])
        self.positions.append(kept + self.n_sums)
        self.n_sums += count
        return base

    def upload(
        self, views: Sequence[View], mine: Sequence[int], sums: Tensor, device: torch.device, n_programs: int
    ) -> Tables:
        items = np.concatenate(self.items).astype(np.int32)
        done = np.concatenate([[0], np.cumsum(np.concatenate(self.sizes))])
        n_programs = min(n_programs, len(items))
        starts = np.searchsorted(done, np.linspace(0, done[-1], n_programs + 1))
        starts[0], starts[-1] = 0, len(items)
        blocks = [
            np.stack([np.full(n, s), np.arange(n)], axis=1)
            for s, n in enumerate(-(-stream[0] // SUM_BLOCK) for stream in self.streams)
        ]
        block_table = np.concatenate([*blocks, np.zeros((0, 2), np.int64)]).astype(np.int32)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        vector = 16 // self.dtype.itemsize

        def put(a: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(a)).to(device)

        return Tables(
            dtype=self.dtype,
            entries=tuple(mine),
            layouts=put(np.array(self.layouts, np.int64)),
            items=put(items),
            starts=put(starts.astype(np.int32)),
            n_programs=n_programs,
            rows_per_item=self.rows_per_item,
            same_order=all(views[i].theta_last == views[i].grad_last for i in mine),
            partials=torch.empty(max(self.n_partials, 1), dtype=wide, device=device),
            streams=put(np.array(self.streams, np.int64).reshape(-1, 8)),
            weights=put(np.array(self.weights, np.float64)),
            blocks=put(block_table),
            n_blocks=len(block_table),
            sums=sums,
            can_align=np.array([views[i].cols % vector == 0 for i in mine]),
        )


def _update_addresses(
    launch: Launch, thetas: Sequence[Tensor], grads: Sequence[Tensor] | None, stacked: bool, device: torch.device
) -> None:
    """Point every part's ``tensors`` at where parameters and gradients lie now."""
    read = thetas if grads is None else grads
    key = (*(t.data_ptr() for t in thetas), *(g.data_ptr() for g in read))
    known = launch.addresses.get(key)
    if known is None:
        rows = [_address_rows(part, thetas, read, stacked) for part in launch.parts]
        known = _upload_addresses(launch, rows, device)
        if not capturing(device):
            launch.addresses[key] = known
            while len(launch.addresses) > REMEMBERED:
                launch.addresses.popitem(last=False)
    elif capturing(device):
        launch.captured.append(known)
    if not capturing(device) and not launch.spare:
        n = 4 * sum(len(part.entries) for part in launch.parts)
        launch.spare.append(_address_memory(n, device))
    for part, tensors in zip(launch.parts, known):
        part.tensors = tensors


def _address_rows(part: Tables, thetas: Sequence[Tensor], grads: Sequence[Tensor], stacked: bool) -> np.ndarray:
    rows = np.zeros((len(part.entries), 4), np.int64)
    for n, i in enumerate(part.entries):
        rows[n] = thetas[i].data_ptr(), grads[i].data_ptr(), grads[i].stride(0) if stacked else 0, 0
    even = (rows[:, :2] % 16 == 0).all(axis=1) & (rows[:, 2] * part.dtype.itemsize % 16 == 0)
    rows[:, 3] = even & part.can_align
    return rows


def _upload_addresses(launch: Launch, rows: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """The address tables on the device, one per part.

    While a CUDA graph is being captured, the copy becomes part of the graph and reads its host memory at every replay:
    it comes out of memory that was set aside before and is never written again.
    """
    flat = torch.from_numpy(np.concatenate([r.reshape(-1) for r in rows]))
    if not capturing(device):
        host, there = _address_memory(flat.numel(), device)
    elif launch.spare:
        host, there = launch.spare.pop()
        launch.captured.append((host, there))
    else:
        raise RuntimeError(
            "channel_scores_: no memory is left for the addresses of another captured call: call it once outside of a "
            "capture before each capture"
        )
    host.copy_(flat)
    there.copy_(host, non_blocking=True)
    return [part.view(r.shape) for part, r in zip(there.split([r.size for r in rows]), rows)]


def _address_memory(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """On the host, from where the device can fetch it by itself, and on the device."""
    host = torch.empty(n, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host, torch.empty(n, dtype=torch.int64, device=device)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, ``device`` is the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def capturing(device: torch.device) -> bool:
    """Whether calls go into a CUDA graph in place of running."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
