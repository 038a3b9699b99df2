"""``channel_scores`` over its tuned constants, one at a time from where they stand: which to change, and by how much.

    python benchmarks/gpu/sweep.py --json FILE [--dry-run]

Times are the device's alone (a captured call). No step of run.sh: take it when the figures there fall short.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gpu_timing
import torch
from gpu_timing import Step, reason, spread
from whole_tables import score_table, shapes_of, tensors

from diffprune_fast import ops
from diffprune_fast.kernels import channel_scores as module
from diffprune_fast.kernels import score_tables

WARPS = (4, 8)
PROGRAMS = (4, 8, 16, 32, 64, 128)
BLOCKS = {
    torch.float32: ((8, 128), (16, 128), (32, 128), (8, 512), (16, 256)),
    torch.bfloat16: ((4, 256), (8, 256), (16, 256), (4, 1024), (8, 512)),
}
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
    yield {}
    yield from ({"NUM_WARPS": n} for n in WARPS)
    yield from ({"PROGRAMS_PER_MULTIPROCESSOR": n} for n in PROGRAMS)
    yield from ({"BLOCKS": score_tables.BLOCKS | {dtype: shape}} for shape in BLOCKS[dtype])
    yield from ({"ROWS_PER_ITEM": rows} for rows in ROWS_PER_ITEM)


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


def main() -> None:
    step = Step("sweep", __doc__.splitlines()[0])
    copy = step.copy_bandwidth()
    for model, dtype in (("cifar", torch.float32), ("sd15", torch.bfloat16), ("sdxl", torch.bfloat16)):
        if not step.wants(model):
            continue
        shapes = shapes_of(step, model)
        thetas, grads = tensors(shapes, dtype, step.device), tensors(shapes, dtype, step.device)
        for setting in settings(dtype):
            words = {k: v[dtype] if k == "BLOCKS" else v for k, v in setting.items()}
            provider = ", ".join(f"{k}={v}" for k, v in words.items()) or "as it stands"
            labels = {"operation": "channel_scores", "model": model, "dtype": str(dtype)[6:], "provider": provider}
            try:
                with constants(**setting):
                    times = time_call(step, thetas, grads)
                rate = 2 * sum(t.nbytes for t in thetas) / times["ms"] / 1e6
                step.row(**labels, **times, gb_s=rate, of_copy=rate / copy)
            except Exception as problem:
                step.failed(**labels, problem=reason(problem))


if __name__ == "__main__":
    assert gpu_timing.ROOT.is_dir()
    main()
