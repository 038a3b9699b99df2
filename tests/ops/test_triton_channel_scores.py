"""The Triton kernels of channel_scores, in Triton's interpreter on CPU tensors, against the float64 reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from diffprune_fast import ops
from diffprune_fast.ops import channel_scores as op

pytest.importorskip("triton")
from diffprune_fast.kernels import channel_scores, score_tables

pytestmark = [
    pytest.mark.skipif(
        not channel_scores.interpreting(), reason="needs Triton's interpreter: run with TRITON_INTERPRET=1"
    ),
    # Triton 3.6's interpreter and older ones; an error from NumPy 2.4 on
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]

N_UNITS = 41
Shape = tuple[int, int, int]
# 1, primes, sizes around the blocks' 32 rows and 128 columns, a depthwise kernel, and more rows than an item has
SHAPES: tuple[Shape, ...] = ((1, 1, 1), (37, 13, 9), (31, 127, 1), (33, 129, 1), (64, 32, 4), (131, 1, 1), (7, 1, 9))


@pytest.fixture(scope="module", autouse=True)
def _interpreter_that_knows_this_numpy() -> None:
    try:
        scored([torch.ones(2, 2)], [torch.ones(2, 2)], make_table([(2, 2, 1)]), "triton")
    except Exception as error:
        if "only 0-dimensional arrays" in str(error):
            pytest.skip("this Triton's interpreter needs NumPy < 2.4")
        raise


def make_table(shapes: Sequence[Shape], seed: int = 0) -> ops.ScoreTable:
    generator = torch.Generator().manual_seed(seed)

    def units(n: int) -> Tensor:
        return torch.randint(-1, N_UNITS, (n,), generator=generator, dtype=torch.int32)

    return ops.ScoreTable([ops.ScoreEntry(s, units(s[0]), units(s[1]), 0.5 + i) for i, s in enumerate(shapes)], N_UNITS)


def make_tensors(
    shapes: Sequence[Shape], dtype: torch.dtype = torch.float32, steps: int | None = None, seed: int = 1
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lead = () if steps is None else (steps,)
    return [torch.randn(lead + s, generator=generator).to(dtype) for s in shapes]


def scored(
    thetas: Sequence[Tensor], grads: Sequence[Tensor] | None, table: ops.ScoreTable, backend: str, **options: object
) -> Tensor:
    scores = torch.zeros(table.n_units, dtype=torch.float64)
    return ops.channel_scores_(scores, thetas, grads, table, backend=backend, **options)  # type: ignore[arg-type]


def assert_as_good_as_torch(
    thetas: Sequence[Tensor], grads: Sequence[Tensor] | None, table: ops.ScoreTable, **options: object
) -> None:
    """The kernel's error against float64 is at most twice that of plain PyTorch in the same dtype."""
    wide_thetas = [t.double() for t in thetas]
    wide_grads = None if grads is None else [g.double() for g in grads]
    truth = scored(wide_thetas, wide_grads, table, "reference", **options)
    plain = scored(thetas, None if grads is None else [g.clone() for g in grads], table, "reference", **options)
    ours = scored(thetas, grads, table, "triton", **options)
    assert not ours.isnan().any()
    assert (ours - truth).abs().max() <= 2 * (plain - truth).abs().max() + 1e-6 * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("criterion", ops.CRITERIA)
def test_scores_equal_the_reference(dtype: torch.dtype, criterion: str) -> None:
    thetas, grads = make_tensors(SHAPES, dtype, seed=1), make_tensors(SHAPES, dtype, seed=2)
    assert_as_good_as_torch(thetas, grads, make_table(SHAPES), criterion=criterion)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stacked_gradients_are_weighted_per_timestep(dtype: torch.dtype) -> None:
    weights = torch.tensor([0.5, -1.25, 3.0])
    thetas, grads = make_tensors(SHAPES, dtype), make_tensors(SHAPES, dtype, steps=3, seed=2)
    assert_as_good_as_torch(thetas, grads, make_table(SHAPES), timestep_weights=weights)


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 255, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes_around_the_block(size: int, dtype: torch.dtype) -> None:
    shapes: list[Shape] = [(size, 3, 1), (3, size, 1), (size, 1, 1)]
    assert_as_good_as_torch(make_tensors(shapes, dtype), make_tensors(shapes, dtype, seed=2), make_table(shapes))


@pytest.mark.parametrize("theta_last", [False, True])
@pytest.mark.parametrize("grad_last", [False, True])
@pytest.mark.parametrize("steps", [None, 2])
def test_memory_formats_may_differ(theta_last: bool, grad_last: bool, steps: int | None) -> None:
    shapes: list[Shape] = [(17, 12, 9), (5, 64, 9)]
    table = make_table(shapes)
    thetas = [t.reshape(*s[:2], 3, 3) for t, s in zip(make_tensors(shapes), shapes)]
    lead = () if steps is None else (steps,)
    grads = [g.reshape(*lead, *s[:2], 3, 3) for g, s in zip(make_tensors(shapes, steps=steps, seed=2), shapes)]
    weights = None if steps is None else torch.tensor([2.0, -0.5])
    expected = scored(thetas, grads, table, "reference", timestep_weights=weights)
    if theta_last:
        thetas = [t.to(memory_format=torch.channels_last) for t in thetas]
    if grad_last and steps is None:
        grads = [g.to(memory_format=torch.channels_last) for g in grads]
    elif grad_last:
        grads = [torch.stack(list(g)).permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3) for g in grads]
    torch.testing.assert_close(
        scored(thetas, grads, table, "triton", timestep_weights=weights), expected, rtol=1e-6, atol=1e-4
    )


@pytest.mark.parametrize("offset", [1, 4])
def test_tensors_that_do_not_start_at_sixteen_bytes(offset: int) -> None:
    shape: Shape = (9, 64, 1)
    memory = torch.randn(offset + 9 * 64)
    theta, grad = memory[offset:].reshape(shape), make_tensors([shape])[0]
    table = make_table([shape])
    assert_as_good_as_torch([theta], [grad], table)


def test_tensors_in_no_usable_memory_order_are_read_and_zeroed_all_the_same() -> None:
    shape: Shape = (12, 10, 1)
    table = make_table([shape])
    theta, grad = torch.randn(10, 12, 1).transpose(0, 1), torch.randn(10, 12, 1).transpose(0, 1)
    expected = scored([theta], [grad], table, "reference")
    torch.testing.assert_close(scored([theta], [grad], table, "triton", zero_grad=True), expected, rtol=1e-6, atol=1e-5)
    assert not grad.any()


@pytest.mark.parametrize("steps", [None, 2])
@pytest.mark.parametrize("criterion", ["abs", "magnitude"])
def test_zero_grad_zeroes_gradients_only(steps: int | None, criterion: str) -> None:
    weights = None if steps is None else torch.ones(2)
    thetas, grads = make_tensors(SHAPES), make_tensors(SHAPES, steps=steps, seed=2)
    before = [t.clone() for t in thetas]
    table = make_table(SHAPES)
    expected = scored(thetas, grads, table, "reference", criterion=criterion, timestep_weights=weights)
    ours = scored(thetas, grads, table, "triton", criterion=criterion, timestep_weights=weights, zero_grad=True)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-4)
    assert not any(g.any() for g in grads)
    assert all(torch.equal(t, b) for t, b in zip(thetas, before))


def test_gradients_stay_without_zero_grad() -> None:
    grads = make_tensors(SHAPES, seed=2)
    before = [g.clone() for g in grads]
    scored(make_tensors(SHAPES), grads, make_table(SHAPES), "triton")
    assert all(torch.equal(g, b) for g, b in zip(grads, before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scores_are_added_to_what_is_there(dtype: torch.dtype) -> None:
    shapes: list[Shape] = [(20, 6, 1)]
    table, thetas = make_table(shapes), make_tensors(shapes)
    scores = torch.full((N_UNITS,), 3.0, dtype=dtype)
    ops.channel_scores_(scores, thetas, thetas, table, backend="triton")
    torch.testing.assert_close(scores, scored(thetas, thetas, table, "reference").to(dtype) + 3)


def test_units_that_no_channel_belongs_to_stay_as_they_are() -> None:
    entry = ops.ScoreEntry((4, 2, 1), torch.tensor([0, -1, 5, 0], dtype=torch.int32))
    scores = torch.full((9,), torch.nan, dtype=torch.float64)
    scores[[0, 5]] = 0
    ops.channel_scores_(scores, [torch.ones(4, 2)], [torch.ones(4, 2)], ops.ScoreTable([entry], 9), backend="triton")
    assert scores[[0, 5]].tolist() == [4, 2]
    assert scores[[1, 2, 3, 4, 6, 7, 8]].isnan().all()


def test_a_table_without_units_changes_nothing_but_still_zeroes() -> None:
    table, grad = ops.ScoreTable([ops.ScoreEntry((4, 2, 1))], 3), torch.ones(4, 2)
    scores = scored([torch.ones(4, 2)], [grad], table, "triton", zero_grad=True)
    assert not scores.any()
    assert not grad.any()


def test_dtypes_may_be_mixed_in_a_table() -> None:
    shapes: list[Shape] = [(20, 6, 1), (8, 33, 1), (5, 5, 9)]
    dtypes = (torch.float32, torch.bfloat16, torch.float32)
    thetas = [t.to(d) for t, d in zip(make_tensors(shapes), dtypes)]
    grads = [t.to(d) for t, d in zip(make_tensors(shapes, seed=2), dtypes)]
    assert_as_good_as_torch(thetas, grads, make_table(shapes))


def test_nan_gradients_reach_only_their_own_units() -> None:
    units = torch.arange(6, dtype=torch.int32)
    table = ops.ScoreTable([ops.ScoreEntry((6, 2, 1), units)], 6)
    grad = torch.ones(6, 2)
    grad[3, 1] = torch.nan
    assert scored([torch.ones(6, 2)], [grad], table, "triton").isnan().tolist() == [False] * 3 + [True] + [False] * 2


def test_the_number_of_programs_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    thetas, grads = make_tensors(SHAPES), make_tensors(SHAPES, seed=2)
    results = []
    for programs in (1, 2, 5, 64):
        monkeypatch.setattr(channel_scores, "programs", lambda device, n=programs: n)
        results.append(scored(thetas, grads, make_table(SHAPES), "triton"))
    assert all(torch.equal(r, results[0]) for r in results)


def test_tables_are_built_once_and_addresses_follow_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    table, thetas = make_table(SHAPES), make_tensors(SHAPES)
    built = []
    build = score_tables._build
    monkeypatch.setattr(score_tables, "_build", lambda *args: built.append(1) or build(*args))
    for seed in range(3):
        grads = make_tensors(SHAPES, seed=10 + seed)
        expected = scored(thetas, grads, table, "reference")
        torch.testing.assert_close(scored(thetas, grads, table, "triton"), expected, rtol=1e-6, atol=1e-4)
    assert len(built) == 1


@pytest.mark.parametrize("options", [{}, {"criterion": "square", "zero_grad": True}], ids=["abs", "square, zeroing"])
def test_a_bound_call_looks_at_addresses_only(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    table, thetas = make_table(SHAPES), make_tensors(SHAPES)
    scores = torch.zeros(N_UNITS, dtype=torch.float64)
    bound = table.bind(scores, thetas, backend="triton", **options)
    looks: list[str] = []
    for module, name in ((op, "check"), (score_tables, "prepare")):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=plain, n=name, **k: looks.append(n) or f(*a, **k))
    places = [make_tensors(SHAPES), make_tensors(SHAPES)]
    for seed in range(4):
        grads = places[seed % 2]
        for grad, new in zip(grads, make_tensors(SHAPES, seed=seed)):
            grad.copy_(new)
        expected = scored(thetas, [g.clone() for g in grads], table, "reference", **options)
        scores.zero_()
        del looks[:]
        assert bound(grads) is scores
        assert looks == (["check", "prepare"] if seed < 2 else [])
        torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-4)
        assert all(bool(g.any()) != bool(options) for g in grads)


def test_a_bound_call_checks_gradients_at_new_addresses() -> None:
    bound = make_table(SHAPES).bind(torch.zeros(N_UNITS), make_tensors(SHAPES), backend="triton")
    with pytest.raises(ValueError, match="gradient 3 has shape"):
        bound([*make_tensors(SHAPES[:3]), torch.ones(3), *make_tensors(SHAPES[4:])])


def test_a_bound_call_reads_copies_of_gradients_in_no_usable_order() -> None:
    theta, grad = torch.randn(12, 10, 1), torch.randn(10, 12, 1).transpose(0, 1)
    table, scores = make_table([(12, 10, 1)]), torch.zeros(N_UNITS, dtype=torch.float64)
    bound = table.bind(scores, [theta], backend="triton")
    for _ in range(2):
        grad.normal_()
        scores.zero_()
        bound([grad])
        torch.testing.assert_close(scores, scored([theta], [grad], table, "reference"), rtol=1e-6, atol=1e-5)


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Lets the kernels' host code believe that a CUDA graph is being captured, or not any more."""
    return lambda on: monkeypatch.setattr(score_tables, "capturing", lambda device: on)


def test_every_capture_finds_memory_for_its_addresses(capture: Callable[[bool], None]) -> None:
    table, thetas = make_table(SHAPES), make_tensors(SHAPES)
    known = make_tensors(SHAPES, seed=2)
    for seed in (3, 4, 5):
        capture(False)
        scored(thetas, known, table, "triton")  # after the first time, at addresses that are known already
        capture(True)
        grads = make_tensors(SHAPES, seed=seed)
        expected = scored(thetas, grads, table, "reference")
        torch.testing.assert_close(scored(thetas, grads, table, "triton"), expected, rtol=1e-6, atol=1e-4)
    with pytest.raises(RuntimeError, match="before each capture"):
        scored(thetas, make_tensors(SHAPES, seed=6), table, "triton")


@pytest.mark.parametrize(
    "options",
    [{"criterion": "square"}, {"zero_grad": True}, {"timestep_weights": torch.ones(5)[1:3]}],
    ids=["criterion", "zero_grad", "weights at another alignment"],
)
def test_a_variant_that_never_ran_is_not_captured(capture: Callable[[bool], None], options: dict[str, Any]) -> None:
    steps = 2 if "timestep_weights" in options else None
    table, thetas, grads = make_table(SHAPES), make_tensors(SHAPES), make_tensors(SHAPES, steps=steps, seed=2)
    scored(thetas, grads, table, "triton", timestep_weights=None if steps is None else torch.ones(2))
    capture(True)
    with pytest.raises(RuntimeError, match="call it once, with the same options"):
        scored(thetas, grads, table, "triton", **options)
    capture(False)
    scored(thetas, [g.clone() for g in grads], table, "triton", **options)
    capture(True)
    scored(thetas, grads, table, "triton", **options)


def test_work_is_split_evenly_whatever_the_layers_sizes() -> None:
    shapes: list[Shape] = [(1, 1, 1), (320, 320, 9), (1280, 64, 1), (3, 1280, 1), *[(64, 1, 1)] * 40]
    entries = [ops.ScoreEntry(s, torch.zeros(s[0], dtype=torch.int32)) for s in shapes]
    thetas = [torch.empty(s) for s in shapes]
    launch = score_tables.prepare(ops.ScoreTable(entries, 1), thetas, None, False, torch.device("cpu"), 16)
    (part,) = launch.parts
    rows, cols = part.rows_per_item, score_tables.BLOCKS[torch.float32][1]
    sizes = [
        min(rows, v.rows - r * rows) * min(cols, v.cols - c * cols)
        for n, r, c in part.items.tolist()
        for v in [score_tables._view(shapes[n], False, False)]
    ]
    assert sum(sizes) == sum(t.numel() for t in thetas)
    costs = [size + score_tables.ITEM_ELEMENTS for size in sizes]
    loads = [sum(costs[a:b]) for a, b in itertools.pairwise(part.starts.tolist())]
    assert max(loads) - sum(loads) / len(loads) <= rows * cols + score_tables.ITEM_ELEMENTS


def test_no_program_gets_all_the_small_items() -> None:
    # biases beside convolutions: by their elements alone all forty would be one program's
    shapes: list[Shape] = [*[(320, 320, 9)] * 4, *[(64, 1, 1)] * 40]
    entries = [ops.ScoreEntry(s, torch.zeros(s[0], dtype=torch.int32)) for s in shapes]
    thetas = [torch.empty(s) for s in shapes]
    (part,) = score_tables.prepare(ops.ScoreTable(entries, 1), thetas, None, False, torch.device("cpu"), 64).parts
    assert max(b - a for a, b in itertools.pairwise(part.starts.tolist())) <= 25


def test_large_tables_use_taller_items() -> None:
    small, large = [torch.empty(64, 64)], [torch.empty(8192, 4096)]
    height = []
    for thetas in (small, large):
        shape: Shape = (*thetas[0].shape, 1)  # type: ignore[assignment]
        table = ops.ScoreTable([ops.ScoreEntry(shape)], 1)
        height.append(score_tables.prepare(table, thetas, None, False, torch.device("cpu"), 16).parts[0].rows_per_item)
    assert height[0] < height[1]
