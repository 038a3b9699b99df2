"""``channel_scores_`` and ``slice_channels_`` on whole parameter tables, every provider checked before timed.

``--part ours`` (step "kernels"): ours, on the tables that the aims name. ``--part others`` (step "baselines"): plain
PyTorch, Torch-Pruning's way and torch.compile. Shapes come from parameter_shapes.json, so that neither needs diffusers
(``--write`` makes it anew from unet_configs.py).

Bytes: scoring reads every weight and gradient; slicing reads the kept rows and writes what stays. Rates stand beside
the copy bandwidth (bytes read + bytes written) measured in the same run.
"""

from __future__ import annotations

import gc
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_timing
import torch
from gpu_timing import Step, spread
from torch import Tensor

from diffprune_fast import ops
from diffprune_fast.ops import cuda, slice_tables

SliceAll = Callable[[list[Tensor], list[ops.Slice]], list[Tensor]]

TINY = [(16, 8, 3, 3), (16,), (24, 16), (24,)]
SHAPES = Path(__file__).with_name("parameter_shapes.json")
TABLES = [("sd15", torch.float32), ("sdxl", torch.bfloat16), ("cifar", torch.float32)]
MORE_TABLES = [("lsun", torch.float32), ("sd15", torch.bfloat16), ("sdxl", torch.float32)]
OTHERS = ("reference", "torch_pruning", "torch.compile")


def shapes_of(step: Step, model: str) -> list[tuple[int, ...]]:
    return TINY if step.rehearsal else [tuple(shape) for shape in json.loads(SHAPES.read_text())[model]]


def tensors(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]


def score_table(shapes: Sequence[tuple[int, ...]]) -> ops.ScoreTable:
    """Every channel its own unit, so that every sum is compared."""
    entries, n = [], 0
    for shape in shapes:
        outer, inner = shape[0], shape[1] if len(shape) > 1 else 1
        rows = torch.arange(n, n + outer, dtype=torch.int32)
        cols = torch.arange(n + outer, n + outer + inner, dtype=torch.int32) if len(shape) > 1 else None
        entries.append(ops.ScoreEntry((outer, inner, math.prod(shape[2:])), rows, cols))
        n += outer + (inner if len(shape) > 1 else 0)
    return ops.ScoreTable(entries, n)


def sums(theta: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column sums in plain operations; what torch.compile gets."""
    value = (theta.float() * grad.float()).abs()
    if value.dim() == 1:
        return value, value
    return value.flatten(1).sum(1), value.transpose(0, 1).flatten(1).sum(1)


def torch_pruning_sums(theta: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Torch-Pruning's operations for a layer's output and input channels (its Taylor importance): two products."""
    if theta.dim() == 1:
        rows = (theta * grad).abs()
        return rows, rows
    rows = (theta.flatten(1) * grad.flatten(1)).abs().sum(1)
    cols = (theta.transpose(0, 1).flatten(1) * grad.transpose(0, 1).flatten(1)).abs().sum(1)
    return rows, cols


def by_layer(f: Callable[..., tuple[Tensor, Tensor]], thetas: list[Tensor], grads: list[Tensor]) -> Tensor:
    parts = []
    for theta, grad in zip(thetas, grads):
        rows, cols = f(theta, grad)
        parts += [rows, cols] if theta.dim() > 1 else [rows]
    return torch.cat([p.float() for p in parts])


def score_providers(
    step: Step, table: ops.ScoreTable, thetas: list[Tensor], grads: list[Tensor], compiles: bool
) -> dict[str, Callable[[Any], Tensor]]:
    scores = torch.zeros(table.n_units, dtype=torch.float64, device=step.device)

    def ours(backend: str) -> Callable[[Any], Tensor]:
        return lambda _: ops.channel_scores_(scores.zero_(), thetas, grads, table, backend=backend)

    if step.part != "others":
        bound = table.bind(scores, thetas)
        out: dict[str, Callable[[Any], Tensor]] = {"ours": ours("auto"), "ours, bound": lambda _: at_zero(bound)}

        def at_zero(call: ops.BoundScores) -> Tensor:
            scores.zero_()
            return call(grads)

        if step.device.type == "cuda":
            out["ours, CUDA graph"] = captured(bound, scores, grads)
        return out
    out = {
        "reference": ours("reference"),
        "torch_pruning": lambda _: by_layer(torch_pruning_sums, thetas, grads),
    }
    if compiles:
        compiled = torch.compile(sums, dynamic=True, backend="eager" if step.rehearsal else "inductor")
        out["torch.compile"] = lambda _: by_layer(compiled, thetas, grads)
    return out


def captured(bound: ops.BoundScores, scores: Tensor, grads: list[Tensor]) -> Callable[[Any], Tensor]:
    """The device's time alone: a captured call has no launch overhead. The graph is made at the first call."""
    graphs: list[torch.cuda.CUDAGraph] = []

    def replay(_: Any) -> Tensor:
        if not graphs:
            bound(grads)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                scores.zero_()
                bound(grads)
            graphs.append(graph)
        graphs[0].replay()
        return scores

    return replay


def measure_scores(step: Step, model: str, dtype: torch.dtype, copy: float) -> None:
    shapes = shapes_of(step, model)
    table = score_table(shapes)
    thetas, grads = tensors(shapes, dtype, step.device), tensors(shapes, dtype, step.device)
    n_bytes = 2 * sum(t.nbytes for t in thetas)
    wanted = torch.zeros(table.n_units, dtype=torch.float64, device=step.device)
    for i, (theta, grad) in enumerate(zip(thetas, grads)):
        ops.reference.channel_scores_(wanted, [theta.double()], [grad.double()], table.subset([i]))
    compiles = (model, dtype) == ("sd15", torch.float32) or step.rehearsal
    for name, work in score_providers(step, table, thetas, grads, compiles).items():
        labels = {"operation": "channel_scores", "model": model, "dtype": str(dtype)[6:], "provider": name}
        with step.attempt(**labels):
            error = float(((work(None).double() - wanted).abs() / wanted.clamp(min=1e-12)).max())
            # Torch-Pruning multiplies in the weights' own dtype: bf16 can't be closer
            if error > (0.05 if name == "torch_pruning" and dtype == torch.bfloat16 else 1e-4):
                raise AssertionError(f"differs from float64 by {error:.2g}")
            times = spread(step.milliseconds(work, 5 if name in OTHERS else 10))
            rate = n_bytes / times["ms"] / 1e6
            step.row(**labels, **times, gb_s=rate, of_copy=rate / copy, error=error)


def slices_of(shapes: Sequence[tuple[int, ...]]) -> list[ops.Slice]:
    """70 % of both dims; dims of 3 and 4 (images, latents) stay. Equal sizes keep the same indices, as in a model."""
    known: dict[int, Tensor] = {}

    def keep(n: int) -> Tensor:
        return known.setdefault(n, torch.randperm(n)[: max(1, n * 7 // 10)].sort().values)

    return [ops.Slice({d: keep(n) for d, n in enumerate(shape[:2]) if n > 4}) for shape in shapes]


def with_torch_pruning(given: list[Tensor], slices: list[ops.Slice]) -> list[Tensor]:
    """Torch-Pruning's own pruning functions, one dim of one layer after the other."""
    from benchmark_slice_channels import with_torch_pruning as layers

    large = [i for i, t in enumerate(given) if t.dim() > 1]
    outs = [t.index_select(0, s.keep[0].to(t.device)) if 0 in s.keep else t for t, s in zip(given, slices)]
    for i, out in zip(large, layers([given[i] for i in large], [slices[i] for i in large])):
        outs[i] = out
    return outs


def in_place(backend: str) -> SliceAll:
    def run(given: list[Tensor], slices: list[ops.Slice]) -> list[Tensor]:
        ops.slice_channels_(given, slices, backend=backend)
        return given

    return run


def measure_slices(step: Step, model: str, dtype: torch.dtype, copy: float) -> None:
    shapes = shapes_of(step, model)
    torch.manual_seed(0)
    slices = slices_of(shapes)
    originals = tensors(shapes, dtype, step.device)
    expected = [ops.reference.slice_channels(t, s) for t, s in zip(originals, slices)]
    read = sum(t.nbytes // t.shape[0] * len(s.keep.get(0, t)) for t, s in zip(originals, slices))
    n_bytes = read + sum(e.nbytes for e in expected)
    if step.part == "others":
        providers = {"reference": in_place("reference"), "torch_pruning": with_torch_pruning}
    else:
        providers = {"ours": in_place("auto")}
        labels = {"operation": "slice_channels", "model": model, "dtype": str(dtype)[6:]}
        with step.attempt(**labels, provider="ours, kernel alone"):
            if cuda.availability() == "ok":
                measure_launch(step, labels, originals, slices, n_bytes, copy)
    for name, run in providers.items():
        labels = {"operation": "slice_channels", "model": model, "dtype": str(dtype)[6:], "provider": name}

        def work(given: list[Tensor], run: SliceAll = run) -> list[Tensor]:
            return run(given, slices)

        def setup() -> list[Tensor]:
            return [t.clone() for t in originals]

        with step.attempt(**labels):
            if not all(torch.equal(a, b) for a, b in zip(work(setup()), expected)):
                raise AssertionError("not what the reference gives")
            extra = peak_extra(step, setup, work)
            times = spread(step.milliseconds(work, 2 if name == "torch_pruning" else 10, setup, wall=True))
            rate = n_bytes / times["ms"] / 1e6
            step.row(**labels, **times, gb_s=rate, of_copy=rate / copy, error=0.0, extra_mb=extra)


def measure_launch(
    step: Step, labels: dict[str, str], originals: list[Tensor], slices: list[ops.Slice], n_bytes: int, copy: float
) -> None:
    """The kernel alone, in one launch: tables and targets are there."""
    tables = slice_tables.build(originals, slices, cuda._cuda.fill_table)
    prepared, everything = cuda.prepare(tables, step.device), range(len(originals))
    targets = [cuda.new_memory(t, shape) for t, shape in zip(originals, tables.shapes)]
    cuda.aim(prepared, everything, targets)
    times = spread(step.milliseconds(lambda _: cuda.launch(prepared, everything), 10))
    rate = n_bytes / times["ms"] / 1e6
    step.row(**labels, provider="ours, kernel alone", **times, gb_s=rate, of_copy=rate / copy)


def peak_extra(step: Step, setup: Callable[[], Any], work: Callable[[Any], Any]) -> float:
    """MB on top of what was there, at the worst moment of a call."""
    given = setup()
    if step.device.type != "cuda":
        work(given)
        return math.nan
    step.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work(given)
    step.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def main() -> None:
    step = Step("baselines" if "others" in sys.argv else "kernels", __doc__.splitlines()[0])
    copy = step.copy_bandwidth()
    step.row(operation="copy", model="4 GiB", provider="torch", gb_s=copy)
    for model, dtype in TABLES[2:] if step.rehearsal else [*TABLES, *MORE_TABLES]:
        if step.wants(model):
            for measure in (measure_scores, measure_slices):
                with step.attempt(operation=measure.__name__, model=model, dtype=str(dtype)[6:]):
                    measure(step, model, dtype, copy)
                if step.part == "others":
                    torch._dynamo.reset()
                gc.collect()
                if step.device.type == "cuda":
                    torch.cuda.empty_cache()


def write_shapes() -> None:
    """parameter_shapes.json, from diffusers' own classes."""
    import unet_configs

    lines = [
        f' "{m}": {json.dumps(unet_configs.parameter_shapes(m), separators=(",", ":"))}'
        for m in ("cifar", "lsun", "sd15", "sdxl")
    ]
    SHAPES.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    assert gpu_timing.ROOT.is_dir()
    if "--write" in sys.argv:
        write_shapes()
    else:
        with torch.no_grad():
            main()
