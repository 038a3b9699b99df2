"""channel_scores on a GPU: against the float64 reference, to the bit the same every time, and inside a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from diffprune_fast import ops

N_UNITS = 500
Shape = tuple[int, int, int]
SHAPES: tuple[Shape, ...] = (
    (1, 1, 1), (37, 13, 9), (31, 127, 1), (33, 129, 1), (257, 511, 1), (320, 320, 9), (1280, 77, 1), (4099, 1, 1),
    (64, 1, 9), (3, 5000, 1),
)  # fmt: skip

pytestmark = pytest.mark.gpu


def make_table(shapes: Sequence[Shape]) -> ops.ScoreTable:
    generator = torch.Generator().manual_seed(0)

    def units(n: int) -> Tensor:
        return torch.randint(-1, N_UNITS, (n,), generator=generator, dtype=torch.int32)

    return ops.ScoreTable([ops.ScoreEntry(s, units(s[0]), units(s[1]), 0.5 + i) for i, s in enumerate(shapes)], N_UNITS)


def make_tensors(
    shapes: Sequence[Shape], device: torch.device, dtype: torch.dtype, seed: int, steps: int | None = None
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lead = () if steps is None else (steps,)
    return [torch.randn(lead + s, generator=generator).to(device, dtype) for s in shapes]


def scored(
    thetas: Sequence[Tensor], grads: Sequence[Tensor], table: ops.ScoreTable, backend: str = "auto", **options: object
) -> Tensor:
    scores = torch.zeros(table.n_units, dtype=torch.float64, device=thetas[0].device)
    return ops.channel_scores_(scores, thetas, grads, table, backend=backend, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("criterion", ops.CRITERIA)
@pytest.mark.parametrize("steps", [None, 3])
@pytest.mark.parametrize("zero_grad", [False, True])
def test_scores_are_as_good_as_pytorchs(
    device: torch.device, dtype: torch.dtype, criterion: str, steps: int | None, zero_grad: bool
) -> None:
    weights = None if steps is None else torch.tensor([0.5, -1.25, 3.0], device=device)
    thetas, grads = make_tensors(SHAPES, device, dtype, 1), make_tensors(SHAPES, device, dtype, 2, steps)
    table = make_table(SHAPES)
    options = {"criterion": criterion, "timestep_weights": weights}
    truth = scored([t.double() for t in thetas], [g.double() for g in grads], table, "reference", **options)
    plain = scored(thetas, grads, table, "reference", **options)
    ours = scored(thetas, grads, table, zero_grad=zero_grad, **options)
    assert (ours - truth).abs().max() <= 2 * (plain - truth).abs().max() + 1e-6 * truth.abs().max()
    assert all(bool(g.any()) != zero_grad for g in grads)


@pytest.mark.parametrize("steps", [None, 2])
def test_zeroing_gradients_loses_nothing_of_them(device: torch.device, steps: int | None) -> None:
    # rows of no multiple of 16 bytes, read by one warp and zeroed by another; so many that every multiprocessor is full
    copies, runs = (300, 200) if device.type == "cuda" else (2, 3)
    shapes: list[Shape] = [(31, 127, 1), (37, 13, 9), (257, 511, 1), (64, 27, 1), (3, 1, 1)] * copies
    table = make_table(shapes)
    weights = None if steps is None else torch.tensor([0.5, -1.25], device=device)
    thetas, originals = (make_tensors(shapes[:5], device, torch.float32, *a) for a in ((1,), (2, steps)))
    thetas, originals = ([t.clone() for _ in range(copies) for t in ts] for ts in (thetas, originals))
    grads = [g.clone() for g in originals]
    expected = scored(thetas, grads, table, timestep_weights=weights)
    for _ in range(runs):
        torch._foreach_copy_(grads, originals)
        assert torch.equal(scored(thetas, grads, table, timestep_weights=weights, zero_grad=True), expected)
    assert not any(bool(g.any()) for g in grads)


@pytest.mark.parametrize("theta_last", [False, True])
@pytest.mark.parametrize("grad_last", [False, True])
def test_memory_formats_may_differ(device: torch.device, theta_last: bool, grad_last: bool) -> None:
    shapes: list[Shape] = [(320, 320, 9), (64, 40, 9)]
    table = make_table(shapes)
    thetas, grads = (
        [t.reshape(*s[:2], 3, 3) for t, s in zip(make_tensors(shapes, device, torch.float32, seed), shapes)]
        for seed in (1, 2)
    )
    expected = scored(thetas, grads, table, "reference")
    thetas = [t.to(memory_format=torch.channels_last) for t in thetas] if theta_last else thetas
    grads = [g.to(memory_format=torch.channels_last) for g in grads] if grad_last else grads
    torch.testing.assert_close(scored(thetas, grads, table), expected, rtol=1e-5, atol=1e-3)


def test_a_hundred_runs_give_the_same_bits(device: torch.device) -> None:
    thetas, grads = make_tensors(SHAPES, device, torch.float32, 1), make_tensors(SHAPES, device, torch.float32, 2)
    table = make_table(SHAPES)
    first = scored(thetas, grads, table)
    # elsewhere in memory every time, beside other work
    for _ in range(99):
        moved = [g.clone() for g in grads]
        assert torch.equal(scored(thetas, moved, table), first)


@pytest.mark.needs_cuda
def test_it_works_on_the_callers_stream() -> None:
    device = torch.device("cuda")
    table, thetas = make_table(SHAPES), make_tensors(SHAPES, device, torch.float32, 1)
    expected = scored(thetas, thetas, table, "reference")
    scored(thetas, thetas, table)  # its first call uploads the table, and waits for that
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        copies = [t.clone() for t in thetas]
        scores = scored(thetas, copies, table)
        assert not stream.query()
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.needs_cuda
def test_a_captured_call_reads_new_values_at_every_replay() -> None:
    device = torch.device("cuda")
    table, thetas = make_table(SHAPES), make_tensors(SHAPES, device, torch.float32, 1)
    grads = make_tensors(SHAPES, device, torch.float32, 2)
    scores = torch.zeros(N_UNITS, dtype=torch.float64, device=device)
    ops.channel_scores_(scores, thetas, grads, table)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores.zero_()
        # addresses that only exist inside the capture
        copies = [g * 1 for g in grads]
        ops.channel_scores_(scores, thetas, copies, table)
    for seed in (5, 6):
        for grad, new in zip(grads, make_tensors(SHAPES, device, torch.float32, seed)):
            grad.copy_(new)
        graph.replay()
        torch.testing.assert_close(scores, scored(thetas, grads, table, "reference"), rtol=1e-5, atol=1e-3)


@pytest.mark.needs_cuda
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_first_call_inside_a_capture_says_what_to_do() -> None:
    device = torch.device("cuda")
    thetas = make_tensors(SHAPES, device, torch.float32, 1)
    scores, table = torch.zeros(N_UNITS, dtype=torch.float64, device=device), make_table(SHAPES)
    with pytest.raises(RuntimeError, match="before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ops.channel_scores_(scores, thetas, thetas, table)


@pytest.mark.needs_cuda
def test_captures_may_follow_each_other() -> None:
    device = torch.device("cuda")
    table, thetas = make_table(SHAPES), make_tensors(SHAPES, device, torch.float32, 1)
    grads = make_tensors(SHAPES, device, torch.float32, 2)
    scores = torch.zeros(N_UNITS, dtype=torch.float64, device=device)
    graphs = []
    for _ in range(3):
        ops.channel_scores_(scores, thetas, grads, table)  # from the second time on at known addresses
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            scores.zero_()
            ops.channel_scores_(scores, thetas, [g * 1 for g in grads], table)
    expected = scored(thetas, grads, table, "reference")
    for graph in graphs:
        graph.replay()
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.needs_cuda
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_variant_that_never_ran_is_not_captured() -> None:
    device = torch.device("cuda")
    thetas = make_tensors(SHAPES, device, torch.float32, 1)
    scores, table = torch.zeros(N_UNITS, dtype=torch.float64, device=device), make_table(SHAPES)
    ops.channel_scores_(scores, thetas, thetas, table)
    with pytest.raises(RuntimeError, match="same options"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ops.channel_scores_(scores, thetas, thetas, table, criterion="square")
