"""The kernels over their tuned constants, one or two at a time from where they stand: which to change, and by how much.

Times of the kernels are the device's alone (``channel_scores`` captured). The last row of each table names the winner.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gpu_timing
import numpy as np
import torch
from end_to_end import unet
from gpu_timing import Step, spread
from scoring_step import ScoringStep
from whole_tables import score_table, shapes_of, slices_of, tensors

from diffprune_fast import ops
from diffprune_fast.kernels import channel_scores as module
from diffprune_fast.kernels import score_tables
from diffprune_fast.ops import cuda, slice_tables

WARPS = (4, 8)
PROGRAMS = (4, 8, 16, 32, 64, 128)
BLOCKS = {
    torch.float32: ((8, 128), (16, 128), (32, 128), (8, 512), (16, 256)),
    torch.bfloat16: ((4, 256), (8, 256), (16, 256), (4, 1024), (8, 512)),
}
ROWS_PER_THREAD = (32, 8, 16, 64, 128)
ROWS_PER_ITEM = ((32, 64), (32, 128), (32, 256), (32, 512), (128, 1024))


@contextmanager
def constants(**values: Any) -> Iterator[None]:
    """NUM_WARPS and PROGRAMS_PER_MULTIPROCESSOR of the kernels' module, BLOCKS and ROWS_PER_ITEM of the tables'."""
    owners = {name: module if hasattr(module, name) else score_tables for name in values}
    before = {name: getattr(owners[name], name) for name in values}
    try:
        for name, value in values.items():
            setattr(owners[name], name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owners[name], name, value)


def settings(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """As it stands, then everything else once."""
    yield {}
    yield from ({"PROGRAMS_PER_MULTIPROCESSOR": n} for n in PROGRAMS if n != module.PROGRAMS_PER_MULTIPROCESSOR)
    yield from ({"ROWS_PER_ITEM": rows} for rows in ROWS_PER_ITEM if rows != score_tables.ROWS_PER_ITEM)
    for shape, warps in itertools.product(BLOCKS[dtype], WARPS):
        if (shape, warps) != (score_tables.BLOCKS[dtype], module.NUM_WARPS):
            yield {"BLOCKS": score_tables.BLOCKS | {dtype: shape}, "NUM_WARPS": warps}


def time_call(step: Step, thetas: list[torch.Tensor], grads: list[torch.Tensor]) -> dict[str, float]:
    table = score_table([tuple(t.shape) for t in thetas])
    scores = torch.zeros(table.n_units, dtype=torch.float64, device=step.device)
    ops.channel_scores_(scores, thetas, grads, table)
    if step.device.type != "cuda":
        return spread(step.milliseconds(lambda _: ops.channel_scores_(scores, thetas, grads, table)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.channel_scores_(scores, thetas, grads, table)
    return spread(step.milliseconds(lambda _: graph.replay()))


def recut(tables: slice_tables.SliceTables, rows: int) -> slice_tables.SliceTables:
    """The same tables with other tiles: ``rows`` rows for every thread, where the tile can hold as many."""
    entries = tables.entries.copy()
    across = 256 >> entries["log2_width"]  # threads one above the other
    changed = tables.tiles > 0
    entries["rows_per_tile"][changed] = np.minimum(256, across * rows)[changed]
    tiles = np.where(
        changed, -(-entries["rows"] // np.maximum(entries["rows_per_tile"], 1)) * entries["column_tiles"], tables.tiles
    )
    entries["first_tile"] = np.cumsum(tiles.clip(0)) - tiles.clip(0)
    tile_entry = np.repeat(np.arange(len(tiles), dtype=np.int32), tiles.clip(0))
    return dataclasses.replace(tables, entries=entries, tiles=tiles, tile_entry=tile_entry)


def sweep_scores(step: Step, model: str, dtype: torch.dtype, copy: float) -> None:
    shapes = shapes_of(step, model)
    thetas, grads = tensors(shapes, dtype, step.device), tensors(shapes, dtype, step.device)
    labels = {"operation": "channel_scores", "model": model, "dtype": str(dtype)[6:]}
    for setting in settings(dtype):
        words = {k: v[dtype] if k == "BLOCKS" else v for k, v in setting.items()}
        provider = ", ".join(f"{k}={v}" for k, v in words.items()) or "as it stands"
        with step.attempt(**labels, provider=provider):
            with constants(**setting):
                times = time_call(step, thetas, grads)
            rate = 2 * sum(t.nbytes for t in thetas) / times["ms"] / 1e6
            step.row(**labels, provider=provider, **times, gb_s=rate, of_copy=rate / copy)
    winner(step, labels)


def sweep_slices(step: Step, model: str, dtype: torch.dtype, copy: float) -> None:
    shapes = shapes_of(step, model)
    given, slices = tensors(shapes, dtype, step.device), slices_of(shapes)
    labels = {"operation": "slice_channels", "model": model, "dtype": str(dtype)[6:]}
    for rows in ROWS_PER_THREAD:
        provider = f"rows per thread {rows}{' (as it stands)' if rows == 32 else ''}"
        with step.attempt(**labels, provider=provider):
            tables = recut(slice_tables.build(given, slices, cuda._cuda.fill_table), rows)
            targets = [cuda.new_memory(t, shape) for t, shape in zip(given, tables.shapes)]
            prepared, everything = cuda.prepare(tables, step.device), range(len(given))
            cuda.aim(prepared, everything, targets)
            times = spread(step.milliseconds(lambda _: cuda.launch(prepared, everything), 10))  # noqa: B023
            step.row(**labels, provider=provider, **times)
    winner(step, labels)


def sweep_buckets(step: Step) -> None:
    model, labels = unet(step, "cifar"), {"operation": "scoring step", "model": "cifar", "dtype": "tf32"}
    for megabytes in (8, 32, 128, 1024):
        provider = f"buckets of {megabytes} MB"
        with step.attempt(**labels, provider=provider):
            both = ScoringStep(step, model, 8 if step.rehearsal else 32, "tf32", bucket_bytes=megabytes << 20).both
            step.row(**labels, provider=provider, **spread(step.milliseconds(both)))
    winner(step, labels)


def winner(step: Step, labels: dict[str, str]) -> None:
    """A row that names the fastest of the rows with these labels."""
    timed = [r for r in step.rows if "ms" in r and all(r.get(k) == v for k, v in labels.items())]
    if timed:
        best = min(timed, key=lambda r: r["ms"])
        step.row(**labels, provider=f"winner: {best['provider']}", ms=best["ms"], ratio=timed[0]["ms"] / best["ms"])


def main() -> None:
    step = Step("sweep", __doc__.splitlines()[0])
    copy = step.copy_bandwidth()
    for model, dtype in (("sd15", torch.float32), ("sdxl", torch.bfloat16), ("cifar", torch.float32)):
        if not step.wants(model) or (step.rehearsal and model != "cifar"):
            continue
        sweep_scores(step, model, dtype, copy)
        if cuda.availability() == "ok":
            with torch.no_grad():
                sweep_slices(step, model, dtype, copy)
    sweep_buckets(step)


if __name__ == "__main__":
    assert gpu_timing.ROOT.is_dir()
    main()
