"""``channel_scores_`` in Triton: one pass over all tensors of a table, then two small ones over its partial sums.

1. ``pass_over_tensors``: one launch for the whole table. A tensor is a matrix in memory order (rows: its outer index;
   columns: everything else), cut into items of some rows by BLOCK_COLS columns. Each program owns a run of items with
   as many elements as every other program's. An item reads its elements once and leaves one partial sum per row and
   one per column.
2. ``sum_partials`` adds up each channel's partial sums, ``add_to_units`` each unit's channels, both in float64.

No atomics: every sum has one writer and a fixed order, so the same input gives the same bits. Nothing waits for the
host, and once a table was used nothing is allocated, so that the calls can be captured in a CUDA graph.
The partial sums, written once and read once, are 1 to 3 % of the bytes that the first pass reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import score_tables
from .score_tables import SUM_BLOCK, UNIT_BLOCK, Tables, block_shape

CRITERIA = {"abs": 0, "signed": 1, "square": 2, "magnitude": 3}


@triton.jit
def _values(theta, grad, CRITERION: tl.constexpr):
    """What an element adds to its row and its column (``ops.reference.channel_values``)."""
    if CRITERION == 0:
        return tl.abs(theta * grad)
    elif CRITERION == 1:
        return theta * grad
    elif CRITERION == 2:
        return theta * grad * (theta * grad)
    else:
        return theta * theta


@triton.jit
def _item(
    theta_address,
    grad_address,
    step_stride,
    rows,
    cols,
    grad_period,
    grad_stride,
    row_base,
    col_base,
    row_tile,
    col_tile,
    rows_per_item,
    step_weights,
    n_steps,
    partials,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    CRITERION: tl.constexpr,
    STACKED: tl.constexpr,
    ZERO_GRAD: tl.constexpr,
    SAME_ORDER: tl.constexpr,
    ALIGNED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """The partial sums of ``rows_per_item`` rows by BLOCK_COLS columns of one tensor."""
    if ALIGNED:
        # says nothing new (the table's builder has checked it), but lets the compiler see 16-byte accesses
        cols = cols // VECTOR * VECTOR
        step_stride = step_stride // VECTOR * VECTOR
        theta = tl.multiple_of((theta_address // 16 * 16).to(tl.pointer_type(DTYPE)), 16)
        grad = tl.multiple_of((grad_address // 16 * 16).to(tl.pointer_type(DTYPE)), 16)
    else:
        theta = theta_address.to(tl.pointer_type(DTYPE))
        grad = grad_address.to(tl.pointer_type(DTYPE))
    first_row = row_tile * rows_per_item
    last_row = tl.minimum(first_row + rows_per_item, rows)
    col = col_tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    if SAME_ORDER:
        grad_col = col
    else:
        # the gradient lies in the other memory order: channels_last beside contiguous
        grad_col = col % grad_period * grad_stride + col // grad_period
    sums = tl.zeros([BLOCK_ROWS, BLOCK_COLS], WIDE)
    for block in range(first_row, last_row, BLOCK_ROWS):
        row = block + tl.arange(0, BLOCK_ROWS)
        inside = (row < last_row)[:, None] & (col < cols)[None, :]
        # 64-bit offsets anew for every block: kept for the next one they would cost a third more registers
        at_row = row.to(tl.int64)[:, None] * cols
        at_grad = at_row + grad_col[None, :]
        t = tl.load(theta + (at_row + col[None, :]), mask=inside, other=0).to(WIDE)
        g = t
        if CRITERION != 3:
            if STACKED:
                g = tl.zeros([BLOCK_ROWS, BLOCK_COLS], WIDE)
                for step in range(n_steps):
                    w = tl.load(step_weights + step).to(WIDE)
                    stack = grad + step * step_stride
                    g += w * tl.load(stack + at_grad, mask=inside, other=0).to(WIDE)
            else:
                g = tl.load(grad + at_grad, mask=inside, other=0).to(WIDE)
        if ZERO_GRAD:
            # Triton lays out loads and stores each on its own and orders nothing between a program's threads: without
            # this, one warp zeroes what another has yet to read (compile_ahead.py refuses that)
            tl.debug_barrier()
            zero = tl.zeros([BLOCK_ROWS, BLOCK_COLS], DTYPE)
            if STACKED:
                for step in range(n_steps):
                    tl.store(grad + step * step_stride + at_grad, zero, mask=inside)
            else:
                tl.store(grad + at_grad, zero, mask=inside)
        value = _values(t, g, CRITERION)
        sums += value
        if row_base >= 0:
            out = row_base + col_tile.to(tl.int64) * rows + row
            tl.store(partials + out, tl.sum(value, axis=1), mask=row < last_row)
    if col_base >= 0:
        out = col_base + row_tile.to(tl.int64) * cols + col
        tl.store(partials + out, tl.sum(sums, axis=0), mask=col < cols)


@triton.jit(do_not_specialize=["rows_per_item", "n_steps"])
def pass_over_tensors(
    tensors,
    layouts,
    items,
    starts,
    step_weights,
    n_steps,
    partials,
    rows_per_item,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    CRITERION: tl.constexpr,
    STACKED: tl.constexpr,
    ZERO_GRAD: tl.constexpr,
    SAME_ORDER: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Row and column sums of every tensor of the table.

    tensors: ``(n, 4)`` int64: addresses of parameter and gradient, elements from one stacked gradient to the next,
    whether 16-byte accesses are possible. layouts: ``(n, 6)`` int64: rows, columns, where the partial sums of rows and
    of columns begin (-1: not wanted), period and stride of the gradient's columns (see SAME_ORDER).
    items: ``(m, 3)`` int32: tensor, row tile, column tile. starts: ``(programs + 1,)`` int32: each program's items.
    """
    program = tl.program_id(0)
    begin = tl.load(starts + program)
    end = tl.load(starts + program + 1)
    for item in range(begin, end):
        entry = tl.load(items + item * 3).to(tl.int64)
        row_tile = tl.load(items + item * 3 + 1)
        col_tile = tl.load(items + item * 3 + 2)
        theta_address = tl.load(tensors + entry * 4)
        grad_address = tl.load(tensors + entry * 4 + 1)
        step_stride = tl.load(tensors + entry * 4 + 2)
        aligned = tl.load(tensors + entry * 4 + 3)
        rows = tl.load(layouts + entry * 6).to(tl.int32)
        cols = tl.load(layouts + entry * 6 + 1).to(tl.int32)
        row_base = tl.load(layouts + entry * 6 + 2)
        col_base = tl.load(layouts + entry * 6 + 3)
        period = tl.load(layouts + entry * 6 + 4).to(tl.int32)
        stride = tl.load(layouts + entry * 6 + 5).to(tl.int32)
        # gradients in another memory order are gathered: one path for all of them needs fewer registers
        if SAME_ORDER and aligned != 0:
            _item(
                theta_address, grad_address, step_stride, rows, cols, period, stride, row_base, col_base,
                row_tile, col_tile, rows_per_item, step_weights, n_steps, partials,
                DTYPE, WIDE, CRITERION, STACKED, ZERO_GRAD, SAME_ORDER, True, VECTOR, BLOCK_ROWS, BLOCK_COLS,
            )  # fmt: skip
        else:
            _item(
                theta_address, grad_address, step_stride, rows, cols, period, stride, row_base, col_base,
                row_tile, col_tile, rows_per_item, step_weights, n_steps, partials,
                DTYPE, WIDE, CRITERION, STACKED, ZERO_GRAD, SAME_ORDER, False, VECTOR, BLOCK_ROWS, BLOCK_COLS,
            )  # fmt: skip


@triton.jit
def sum_partials(partials, streams, weights, blocks, sums, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """Each channel's partial sums, in float64, times its tensor's weight.

    streams: ``(s, 8)`` int64: number of channels, first partial sum, counts and strides of the two loops over partial
    sums, stride from channel to channel, where the sums go. blocks: ``(b, 2)`` int32: stream, block of BLOCK channels.
    """
    block = tl.program_id(0)
    stream = tl.load(blocks + block * 2).to(tl.int64)
    channel = tl.load(blocks + block * 2 + 1) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(streams + stream * 8)
    base = tl.load(streams + stream * 8 + 1)
    n_slow = tl.load(streams + stream * 8 + 2).to(tl.int32)
    slow_stride = tl.load(streams + stream * 8 + 3)
    n_fast = tl.load(streams + stream * 8 + 4).to(tl.int32)
    fast_stride = tl.load(streams + stream * 8 + 5)
    channel_stride = tl.load(streams + stream * 8 + 6)
    out = tl.load(streams + stream * 8 + 7)
    total = tl.zeros([DEPTH, BLOCK], tl.float64)
    start = base + channel.to(tl.int64)[None, :] * channel_stride
    for first in range(0, n_slow * n_fast, DEPTH):
        n = first + tl.arange(0, DEPTH)
        offset = (n // n_fast) * slow_stride + (n % n_fast) * fast_stride
        inside = (n < n_slow * n_fast)[:, None] & (channel < count)[None, :]
        total += tl.load(partials + (start + offset[:, None]), mask=inside, other=0).to(tl.float64)
    weight = tl.load(weights + stream)
    tl.store(sums + out + channel, tl.sum(total, axis=0) * weight, mask=channel < count)


@triton.jit(do_not_specialize=["n_units"])
def add_to_units(sums, first, order, scores, n_units, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """``scores[u] += `` the sums of its channels: ``sums[order[first[u]:first[u + 1]]]``."""
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = unit < n_units
    begin = tl.load(first + unit, mask=known, other=0)
    end = tl.load(first + unit + 1, mask=known, other=0)
    total = tl.zeros([BLOCK, DEPTH], tl.float64)
    for step in range(0, tl.max(end - begin, axis=0), DEPTH):
        k = begin[:, None] + (step + tl.arange(0, DEPTH))[None, :]
        inside = k < end[:, None]
        at = tl.load(order + k, mask=inside, other=0)
        total += tl.load(sums + at, mask=inside, other=0)
    old = tl.load(scores + unit, mask=known, other=0)
    new = old.to(tl.float64) + tl.sum(total, axis=1)
    tl.store(scores + unit, new.to(old.dtype), mask=known & (end > begin))


NUM_WARPS = 4
PROGRAMS_PER_MULTIPROCESSOR = 32
WIDE = {torch.float64: tl.float64}
ELEMENT = {dtype: getattr(tl, str(dtype).removeprefix("torch.")) for dtype in score_tables.BLOCKS}


def availability() -> str:
    """``"ok"``, or why Triton can't serve on this machine."""
    if interpreting() or torch.cuda.is_available():
        return "ok"
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return "ok"
    return f"Triton {triton.__version__} is installed, but PyTorch sees no GPU"


def interpreting() -> bool:
    """Whether the kernels run in Triton's interpreter (TRITON_INTERPRET=1 when this module was imported)."""
    return not isinstance(pass_over_tensors, triton.JITFunction)


def channel_scores_(
    scores: Tensor,
    thetas: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
    table: Any,
    *,
    criterion: str = "abs",
    timestep_weights: Tensor | None = None,
    zero_grad: bool = False,
) -> Tensor:
    """As :func:`diffprune_fast.ops.channel_scores_`, whose checks come first.

    A table's first call uploads its tables and allocates its workspace. A later call uploads addresses only, and only
    if a tensor moved. A table's workspace serves one stream at a time.
    Raises RuntimeError if a CUDA graph is being captured and the same call was not made before: its tables or its
    kernels aren't on the device then.
    """
    with score_tables.on(scores.device), torch.no_grad():
        call = Call(scores, criterion, timestep_weights, zero_grad and grads is not None)
        launch = call.prepare(thetas, grads, table)
        call.run(launch, table.n_units)
        if call.zero_grad and grads is not None:
            for i in launch.copied:
                grads[i].zero_()
    return scores


def bind(
    scores: Tensor,
    thetas: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
    table: Any,
    *,
    criterion: str,
    timestep_weights: Tensor | None,
    zero_grad: bool,
) -> Callable[[Sequence[Tensor] | None], object]:
    """The same call for gradients at the addresses of these, with nothing left to do but the launches."""
    device = scores.device

    options = {"criterion": criterion, "timestep_weights": timestep_weights, "zero_grad": zero_grad}

    def from_the_start(grads: Sequence[Tensor] | None) -> Tensor:
        return channel_scores_(scores, thetas, grads, table, **options)  # type: ignore[arg-type]

    if score_tables.capturing(device):  # what it uploads is there only when the graph is replayed
        return from_the_start
    with score_tables.on(device), torch.no_grad():
        call = Call(scores, criterion, timestep_weights, zero_grad and grads is not None)
        launch = call.prepare(thetas, grads, table)
    if launch.copies:
        return from_the_start
    addresses = [part.tensors for part in launch.parts]

    def at_the_same_addresses(_: Sequence[Tensor] | None) -> None:
        with score_tables.on(device):
            if score_tables.capturing(device):
                launch.captured.append(addresses)
            for part, tensors in zip(launch.parts, addresses):
                part.tensors = tensors
            call.run(launch, table.n_units)

    return at_the_same_addresses


class Call:
    """What the kernels are launched with, besides a table and its tensors."""

    def __init__(self, scores: Tensor, criterion: str, timestep_weights: Tensor | None, zero_grad: bool) -> None:
        self.scores, self.criterion, self.zero_grad = scores, criterion, zero_grad
        self.stacked = timestep_weights is not None
        self.weights, self.n_steps = _step_weights(timestep_weights, scores)
        # Triton makes other code for addresses that aren't multiples of 16
        places = [(t.dtype, t.data_ptr() % 16 == 0) for t in (scores, self.weights)]
        self.variant = (criterion, zero_grad, self.stacked, *places)

    def prepare(self, thetas: Sequence[Tensor], grads: Sequence[Tensor] | None, table: Any) -> score_tables.Launch:
        used = grads if self.criterion != "magnitude" or self.zero_grad else None
        device = self.scores.device
        return score_tables.prepare(table, thetas, used, self.stacked, device, programs(device))

    def run(self, launch: score_tables.Launch, n_units: int) -> None:
        """Launch the kernels on the current stream."""
        if self.variant not in launch.launched and score_tables.capturing(self.scores.device):
            raise RuntimeError(
                f"channel_scores_: criterion={self.criterion!r}, zero_grad={self.zero_grad} hasn't run yet on these "
                "tensors, and loading its kernels can't be captured in a CUDA graph: call it once, with the same "
                "options and dtypes, before the capture"
            )
        for tables in launch.parts:
            _run_part(tables, self.weights, self.n_steps, self.criterion, self.stacked, self.zero_grad)
        if launch.n_sums:
            grid = (triton.cdiv(n_units, UNIT_BLOCK),)
            add_to_units[grid](
                launch.sums, launch.first, launch.order, self.scores, n_units, BLOCK=UNIT_BLOCK, DEPTH=16
            )
        launch.launched.add(self.variant)


def _run_part(tables: Tables, weights: Tensor, n_steps: int, criterion: str, stacked: bool, zero_grad: bool) -> None:
    rows, cols = block_shape(tables.dtype, stacked, tables.same_order)
    pass_over_tensors[(tables.n_programs,)](
        tables.tensors,
        tables.layouts,
        tables.items,
        tables.starts,
        weights,
        n_steps,
        tables.partials,
        tables.rows_per_item,
        DTYPE=ELEMENT[tables.dtype],
        WIDE=WIDE.get(tables.dtype, tl.float32),
        CRITERION=CRITERIA[criterion],
        STACKED=stacked,
        ZERO_GRAD=zero_grad,
        SAME_ORDER=tables.same_order,
        VECTOR=16 // tables.dtype.itemsize,
        BLOCK_ROWS=rows,
        BLOCK_COLS=cols,
        num_warps=NUM_WARPS,
    )
    if tables.n_blocks:
        sum_partials[(tables.n_blocks,)](
            tables.partials, tables.streams, tables.weights, tables.blocks, tables.sums, BLOCK=SUM_BLOCK, DEPTH=8
        )


def _step_weights(timestep_weights: Tensor | None, scores: Tensor) -> tuple[Tensor, int]:
    """Weights on the device. Without a stack nothing reads them; any address will do."""
    if timestep_weights is None:
        return scores, 0
    if timestep_weights.device != scores.device and score_tables.capturing(scores.device):
        raise RuntimeError(
            f"channel_scores_: timestep_weights are on {timestep_weights.device}, and a copy that the host waits for "
            f"can't be captured in a CUDA graph: put them on {scores.device} before the capture"
        )
    return timestep_weights.to(scores.device).contiguous(), timestep_weights.numel()


def programs(device: torch.device) -> int:
    """How many programs share a table's items.

    Several times what fits on a multiprocessor at once, so that the hardware evens out what the equal split can't know
    (not yet measured; benchmarks/gpu/sweep.py does).
    """
    if device.type == "cuda":
        return PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    return 3 if interpreting() else 2048
