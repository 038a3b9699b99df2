"""channel_scores_: the C++ kernel against the float64 reference, and what it refuses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffprune_fast import ops
from diffprune_fast.ops import cpu

pytestmark = pytest.mark.skipif(cpu.availability() != "ok", reason=cpu.availability())

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# One float32 rounding per element is 2**-24; lanes and accumulators add a few more. Relative to the sum of magnitudes.
EPSILON = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-21, torch.float16: 2.0**-21, torch.float64: 2.0**-50}


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def simd(level: int) -> Iterator[None]:
    cpu._cpu.limit_simd(level)
    try:
        yield
    finally:
        cpu._cpu.limit_simd(2)


def random_entry(shape: tuple[int, ...], n_units: int, rng: torch.Generator, weight: float = 1.0) -> ops.ScoreEntry:
    """Index tables with gaps (-1) and units that are hit several times."""
    outer, inner = shape[0], shape[1] if len(shape) > 1 else 1
    rows = torch.randint(-1, n_units, (outer,), generator=rng).int()
    cols = torch.randint(-1, n_units, (inner,), generator=rng).int()
    trailing = max(1, torch.Size(shape[2:]).numel())
    return ops.ScoreEntry((outer, inner, trailing), rows, cols if len(shape) > 1 else None, weight)


def random_tensor(shape, dtype, rng, channels_last=False):
    tensor = torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)
    if channels_last and tensor.dim() == 4:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def assert_close(thetas, grads, table, dtype, **options):
    """err(kernel) <= 2 * err(reference in the same dtype) + eps * sum of magnitudes, against float64."""
    wide = [t.double() for t in thetas]
    wide_grads = None if grads is None else [g.double() for g in grads]
    start = torch.linspace(-1, 1, table.n_units, dtype=torch.float64)
    weights = options.pop("timestep_weights", None)
    double_weights = None if weights is None else weights.double()
    truth = ops.reference.channel_scores_(
        start.clone(), wide, wide_grads, table, timestep_weights=double_weights, **options
    )
    plain = ops.reference.channel_scores_(start.clone(), thetas, grads, table, timestep_weights=weights, **options)
    got = ops.channel_scores_(start.clone(), thetas, grads, table, timestep_weights=weights, backend="cpu", **options)
    magnitude = options | {"criterion": {"signed": "abs"}.get(options["criterion"], options["criterion"])}
    absolute = ops.ScoreTable(
        [ops.ScoreEntry(e.shape, e.row_units, e.col_units, abs(e.weight)) for e in table.entries], table.n_units
    )
    if weights is not None:  # the sum over timesteps cancels too
        wide_grads = [torch.tensordot(double_weights.abs(), g.abs(), 1) for g in wide_grads]
    scale = ops.reference.channel_scores_(start.abs(), wide, wide_grads, absolute, **magnitude)
    error, allowed = (got - truth).abs(), 2 * (plain - truth).abs() + EPSILON[dtype] * scale
    assert (error <= allowed).all(), f"error {error.max():.3g}, allowed {allowed[error > allowed].min():.3g}"


shapes = st.one_of(
    st.tuples(st.integers(1, 150)),
    st.tuples(st.integers(1, 140), st.integers(1, 90)),
    st.tuples(st.integers(1, 70), st.integers(1, 40), st.sampled_from([1, 3]), st.sampled_from([1, 3, 5])),
    st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 70)),
)


@settings(max_examples=120, deadline=None)
@given(
    shape_list=st.lists(shapes, min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    criterion=st.sampled_from(ops.CRITERIA),
    steps=st.sampled_from([None, None, 1, 3, 8]),
    channels_last=st.booleans(),
    n_units=st.integers(1, 40),
    n_threads=st.sampled_from([1, 2, 7]),
    level=st.sampled_from([0, 1, 2]),
    seed=st.integers(0, 2**31),
)
def test_equals_the_reference(
    shape_list, dtype, criterion, steps, channels_last, n_units, n_threads, level, seed
) -> None:
    rng = torch.Generator().manual_seed(seed)
    table = ops.ScoreTable([random_entry(s, n_units, rng, 0.5 + i) for i, s in enumerate(shape_list)], n_units)
    thetas = [random_tensor(s, dtype, rng, channels_last) for s in shape_list]
    weights = None if steps is None else torch.rand(steps, generator=rng)
    grads = [random_tensor(s, dtype, rng, channels_last) for s in shape_list]
    if steps is not None:
        grads = [torch.stack([random_tensor(s, dtype, rng) for _ in range(steps)]) for s in shape_list]
        if channels_last:
            grads = [
                g.transpose(1, 2).contiguous(memory_format=torch.channels_last_3d).transpose(1, 2)
                if g.dim() == 5
                else g
                for g in grads
            ]
    with threads(n_threads), simd(level):
        assert_close(thetas, grads, table, dtype, criterion=criterion, timestep_weights=weights)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (63, 16), (64, 17), (65, 33), (129, 1024), (5, 1025), (3, 16385), (2, 40000), (7, 1821, 3, 3), (5, 2000, 3, 3),
        (2, 3, 200, 100), (300000,), (1,), (1, 1, 1, 1),
    ],
)  # fmt: skip
def test_sizes_around_the_block_sizes(shape, channels_last) -> None:
    rng = torch.Generator().manual_seed(1)
    table = ops.ScoreTable([random_entry(shape, 50, rng)], 50)
    theta, grad = (random_tensor(shape, torch.float32, rng, channels_last) for _ in range(2))
    assert_close([theta], [grad], table, torch.float32, criterion="abs")


def many_tensors(rng: torch.Generator, dtype: torch.dtype = torch.float32):
    sizes = [(300, 700), (17,), (256, 128, 3, 3), (1,), (5, 20000), (1000,), (64, 64, 3, 3), (700, 300)]
    table = ops.ScoreTable([random_entry(s, 97, rng, 1 + i / 7) for i, s in enumerate(sizes)], 97)
    return table, [random_tensor(s, dtype, rng) for s in sizes], [random_tensor(s, dtype, rng) for s in sizes]


@pytest.mark.parametrize("scores_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_any_number_of_threads_gives_the_same_bits(level, scores_dtype) -> None:
    table, thetas, grads = many_tensors(torch.Generator().manual_seed(2))
    results = []
    for n in (1, 2, 7, 2):
        with threads(n), simd(level):
            scores = torch.full((97,), 0.1, dtype=scores_dtype)
            results.append(ops.channel_scores_(scores, thetas, grads, table, backend="cpu"))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_subset_adds_up_to_the_whole_table() -> None:
    table, thetas, grads = many_tensors(torch.Generator().manual_seed(3))
    whole = ops.channel_scores_(torch.zeros(97, dtype=torch.float64), thetas, grads, table, backend="cpu")
    parts = torch.zeros(97, dtype=torch.float64)
    for bucket in ([0, 3, 5], [1, 2], [4, 6, 7]):
        some = table.subset(bucket)
        ops.channel_scores_(parts, [thetas[i] for i in bucket], [grads[i] for i in bucket], some, backend="cpu")
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [None, 3])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_zero_grad_zeroes_the_gradients_and_nothing_else(backend, steps, dtype) -> None:
    rng = torch.Generator().manual_seed(4)
    shape = (37, 23, 3, 3)
    numel = torch.Size(shape).numel() * (steps or 1)
    guarded = torch.full((numel + 128,), 7.0, dtype=dtype)
    full = shape if steps is None else (steps, *shape)
    grad = guarded[64:-64].view(full)
    grad.copy_(torch.randn(full, generator=rng))
    theta = random_tensor(shape, dtype, rng)
    before = theta.clone()
    weights = None if steps is None else torch.ones(steps)
    table = ops.ScoreTable([random_entry(shape, 9, rng)], 9)
    kept = ops.channel_scores_(
        torch.zeros(9, dtype=torch.float64), [theta], [grad.clone()], table, timestep_weights=weights, backend=backend
    )
    zeroed = ops.channel_scores_(
        torch.zeros(9, dtype=torch.float64), [theta], [grad], table, timestep_weights=weights, zero_grad=True,
        backend=backend,
    )  # fmt: skip
    assert torch.equal(kept, zeroed)
    assert (grad == 0).all()
    assert (guarded[:64] == 7).all()
    assert (guarded[-64:] == 7).all()
    assert torch.equal(theta, before)


def test_a_nan_reaches_its_row_and_its_column_only() -> None:
    rows, cols = torch.arange(6, dtype=torch.int32), torch.arange(6, 11, dtype=torch.int32)
    table = ops.ScoreTable([ops.ScoreEntry((6, 5, 9), rows, cols)], 13)
    grad = torch.ones(6, 5, 3, 3)
    grad[2, 3, 1, 1] = float("nan")
    scores = ops.channel_scores_(torch.zeros(13), [torch.ones(6, 5, 3, 3)], [grad], table, backend="cpu")
    assert scores.isnan().nonzero().flatten().tolist() == [2, 9]
    assert scores[11:].tolist() == [0, 0]


def test_unlisted_units_keep_their_bits() -> None:
    table = ops.ScoreTable([ops.ScoreEntry((4, 3, 1), torch.tensor([1, -1, 1, -1], dtype=torch.int32), None)], 3)
    scores = torch.tensor([float("nan"), 1.0, float("-inf")], dtype=torch.float64)
    ops.channel_scores_(scores, [torch.ones(4, 3)], [torch.ones(4, 3)], table, backend="cpu")
    assert scores[0].isnan()
    assert scores[1:].tolist() == [7.0, float("-inf")]


@pytest.mark.parametrize("level", [0, 1, 2])
def test_half_precision_is_widened_exactly(level) -> None:
    """Every finite float16 and bfloat16 value, one row each."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    for dtype in (torch.float16, torch.bfloat16):
        theta = every.view(dtype)
        theta = theta[theta.isfinite()]
        units = torch.arange(len(theta), dtype=torch.int32)
        table = ops.ScoreTable([ops.ScoreEntry((len(theta), 1, 1), units)], len(theta))
        with simd(level):
            scores = torch.zeros(len(theta), dtype=torch.float64)
            ops.channel_scores_(scores, [theta], [torch.ones_like(theta)], table, criterion="signed", backend="cpu")
        assert torch.equal(scores, theta.double())


def test_strided_tensors_are_scored_and_zeroed_where_they_are() -> None:
    rng = torch.Generator().manual_seed(5)
    theta = torch.randn(20, 30, generator=rng).t()
    grad = torch.randn(20, 60, generator=rng)[:, ::2].t()
    table = ops.ScoreTable([random_entry((30, 20), 8, rng)], 8)
    expected = ops.reference.channel_scores_(
        torch.zeros(8, dtype=torch.float64), [theta.contiguous().double()], [grad.contiguous().double()], table
    )
    got = ops.channel_scores_(
        torch.zeros(8, dtype=torch.float64), [theta], [grad], table, zero_grad=True, backend="cpu"
    )
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert (grad == 0).all()


def test_a_parameter_of_other_rank_is_seen_through_its_collapsed_shape() -> None:
    rng = torch.Generator().manual_seed(6)
    theta, grad = torch.randn(4, 6, 5, generator=rng), torch.randn(4, 6, 5, generator=rng)
    table = ops.ScoreTable([ops.ScoreEntry((24, 5, 1), None, torch.arange(5, dtype=torch.int32))], 5)
    got = ops.channel_scores_(torch.zeros(5), [theta], [grad], table, backend="cpu")
    torch.testing.assert_close(got, (theta * grad).abs().sum((0, 1)))


def valid() -> dict:
    table = ops.ScoreTable([ops.ScoreEntry((4, 3, 1), torch.arange(4, dtype=torch.int32), None)], 4)
    return {"scores": torch.zeros(4), "thetas": [torch.ones(4, 3)], "grads": [torch.ones(4, 3)], "table": table}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": torch.zeros(4, dtype=torch.float16)}, TypeError, "float32 or float64"),
        ({"scores": torch.zeros(5)}, ValueError, r"shape \(4,\)"),
        ({"scores": torch.zeros(8)[::2]}, ValueError, "contiguous"),
        ({"thetas": []}, ValueError, "0 parameters for a table of 1"),
        ({"thetas": [torch.ones(4, 3, dtype=torch.int64)]}, TypeError, "parameter 0 is torch.int64"),
        ({"thetas": [torch.ones(3, 4)]}, ValueError, r"parameter 0 of shape \(3, 4\)"),
        ({"thetas": [torch.ones(4, 3, device="meta")]}, ValueError, "on meta"),
        ({"grads": []}, ValueError, "0 gradients for 1"),
        ({"grads": None}, ValueError, "needs gradients"),
        ({"grads": [torch.ones(4, 3, dtype=torch.float64)]}, ValueError, "gradient 0 is torch.float64"),
        ({"grads": [torch.ones(3, 4)]}, ValueError, r"gradient 0 has shape \(3, 4\)"),
        ({"timestep_weights": torch.ones(2)}, ValueError, r"expected \(2, 4, 3\)"),
        ({"timestep_weights": torch.ones(1, 2)}, ValueError, r"must be \(T,\)"),
        ({"criterion": "l2"}, ValueError, "criterion 'l2' is unknown"),
        ({"zero_grad": True, "grads": [torch.ones(1, 3).expand(4, 3)]}, ValueError, "stride 0"),
        ({"backend": "cuda"}, ops.BackendError, "no backend 'cuda'"),
        ({"backend": "triton", "scores": torch.zeros(4)}, ops.BackendError, "triton"),
    ],
)
def test_wrong_input_is_one_clear_error_and_nothing_is_written(change, error, message, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = valid() | change
    scores, grads = arguments["scores"].clone(), [g.clone() for g in arguments["grads"] or []]
    with pytest.raises(error, match=message):
        ops.channel_scores_(**arguments)
    assert torch.equal(arguments["scores"], scores)
    assert all(torch.equal(a, b) for a, b in zip(arguments["grads"] or [], grads))


@pytest.mark.parametrize("shares", ["theta", "gradient", "scores"])
def test_zeroing_memory_that_something_else_uses_is_refused(shares) -> None:
    table = ops.ScoreTable([ops.ScoreEntry((4, 1, 1), torch.arange(4, dtype=torch.int32))] * 2, 4)
    memory = torch.ones(16)
    thetas, grads, scores = [torch.ones(4), torch.ones(4)], [memory[0:4], torch.ones(4)], torch.zeros(4)
    if shares == "theta":
        thetas[1] = memory[2:6]
    elif shares == "gradient":
        grads[1] = memory[2:6]
    else:
        scores = memory[3:7]
    before = memory.clone()
    with pytest.raises(ValueError, match="shares memory"):
        ops.channel_scores_(scores, thetas, grads, table, zero_grad=True, backend="cpu")
    assert torch.equal(memory, before)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (ops.ScoreEntry((4, 0, 1)), "positive sizes"),
        (ops.ScoreEntry((4, 3, 1), torch.zeros(3, dtype=torch.int32)), r"row_units must be int32 of shape \(4,\)"),
        (ops.ScoreEntry((4, 3, 1), None, torch.zeros(3, dtype=torch.int64)), "col_units must be int32"),
        (ops.ScoreEntry((2, 3, 1), torch.tensor([0, 5], dtype=torch.int32)), r"holds 5, outside \[-1, 5\)"),
        (ops.ScoreEntry((2, 3, 1), torch.tensor([-2, 0], dtype=torch.int32)), "holds -2"),
        (ops.ScoreEntry((2, 3, 1), weight=float("nan")), "not finite"),
    ],
)
def test_a_wrong_table_is_refused_when_it_is_built(entry, message) -> None:
    with pytest.raises(ValueError, match=message):
        ops.ScoreTable([entry], 5)


def test_backend_override_from_the_environment(monkeypatch) -> None:
    arguments = valid()
    monkeypatch.setenv("DIFFPRUNE_BACKEND", "reference")
    monkeypatch.setattr(cpu, "channel_scores_", None)  # must not be called
    assert ops.channel_scores_(**arguments).tolist() == [3, 3, 3, 3]
    monkeypatch.setenv("DIFFPRUNE_BACKEND", "fast")
    with pytest.raises(ops.BackendError, match="'fast' is unknown"):
        ops.channel_scores_(**arguments)


def test_registered_operation_passes_torch_opcheck() -> None:
    rows, cols = torch.arange(8, dtype=torch.int32), torch.arange(8, 12, dtype=torch.int32)
    arguments = (
        torch.zeros(12), [torch.randn(8, 4, 3, 3)], [torch.randn(8, 4, 3, 3)], [8, 4, 9], [rows], [cols], [1.0], "abs",
        None, True,
    )  # fmt: skip
    results = torch.library.opcheck(torch.ops.diffprune_fast.channel_scores_.default, arguments)
    assert set(results.values()) == {"SUCCESS"}
