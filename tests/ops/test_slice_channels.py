"""slice_channels_: exactly the kept channels, in the same tensor, and nothing touched where it refuses."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffprune_fast import ops
from diffprune_fast.ops import cpu
from diffprune_fast.ops.slice_channels import slice_steps

pytestmark = pytest.mark.skipif(cpu.availability() != "ok", reason=cpu.availability())

DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool, torch.complex128,
    torch.float8_e4m3fn,
]  # fmt: skip


@contextlib.contextmanager
def machine(n_threads: int = 2, level: int = 2, within: bool = False) -> Iterator[None]:
    """within: compact within the tensor's own memory, however small it is."""
    before = torch.get_num_threads(), cpu._LARGE
    torch.set_num_threads(n_threads)
    cpu._cpu.limit_simd(level)
    cpu._LARGE = 0 if within else before[1]
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        cpu._cpu.limit_simd(2)
        cpu._LARGE = before[1]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's elements as bytes, so that NaN equals NaN."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def random_bits(shape, dtype, rng) -> torch.Tensor:
    """Any bit pattern: NaN and denormals have to survive."""
    size = torch.Size(shape).numel() * torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), generator=rng).to(torch.uint8)
    return raw.view(dtype).view(shape)


def random_keep(n: int, rng: torch.Generator, count: int | None = None) -> torch.Tensor:
    count = int(torch.randint(1, n + 1, (), generator=rng)) if count is None else count
    return torch.randperm(n, generator=rng)[:count].sort().values


def expected(tensor: torch.Tensor, keep: dict[int, torch.Tensor]) -> torch.Tensor:
    out = tensor.view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size(), tensor.dtype)
    )
    for dim, index in keep.items():
        out = out.index_select(dim, index)
    return out.view(tensor.dtype)


@settings(max_examples=200, deadline=None)
@given(
    shape=st.lists(st.sampled_from([1, 2, 3, 7, 16, 31, 65]), min_size=1, max_size=4),
    dims=st.sets(st.integers(0, 3), min_size=0, max_size=2),
    order_seed=st.sampled_from([None, None, 1, 2, 3]),
    dtype=st.sampled_from(DTYPES),
    n_threads=st.sampled_from([1, 2, 7]),
    level=st.sampled_from([0, 2]),
    within=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_keeps_exactly_the_kept_channels(shape, dims, order_seed, dtype, n_threads, level, within, seed) -> None:
    """order_seed: the tensor's dims in memory in some other order (channels_last is one of them)."""
    rng = torch.Generator().manual_seed(seed)
    tensor = random_bits(shape, dtype, rng)
    if order_seed is not None:
        order = torch.randperm(len(shape), generator=torch.Generator().manual_seed(order_seed)).tolist()
        tensor = tensor.permute(order).contiguous().permute([order.index(d) for d in range(len(shape))])
    keep = {d: random_keep(shape[d], rng) for d in dims if d < len(shape)}
    wanted = expected(tensor.contiguous(), keep)
    with machine(n_threads, level, within):
        ops.slice_channels_([tensor], [ops.Slice(keep)], backend="cpu")
    assert tensor.shape == wanted.shape
    assert torch.equal(bits(tensor), bits(wanted))


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float64])
@pytest.mark.parametrize(
    ("shape", "channels_last"), [((700, 640, 3, 3), False), ((700, 640, 3, 3), True), ((3000, 1500), False)]
)
def test_large_tensors_by_many_threads(shape, channels_last, dtype, level) -> None:
    """Over the size from which work is cut up and huge pages are asked for."""
    rng = torch.Generator().manual_seed(0)
    tensor = random_bits(shape, dtype, rng)
    if channels_last:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    keep = {0: random_keep(shape[0], rng, shape[0] * 2 // 3), 1: random_keep(shape[1], rng, shape[1] // 2)}
    wanted = expected(tensor.contiguous(), keep)
    with machine(7, level):
        ops.slice_channels_([tensor], [ops.Slice(keep)], backend="cpu")
    assert torch.equal(bits(tensor), bits(wanted))
    assert tensor.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 63, 64, 65, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
def test_rows_around_the_vector_width(width, dtype, within) -> None:
    rng = torch.Generator().manual_seed(width)
    for count in {1, width // 2 or 1, width}:
        tensor = random_bits((5, width), dtype, rng)
        keep = {1: random_keep(width, rng, count)}
        wanted = expected(tensor, keep)
        with machine(within=within):
            ops.slice_channels_([tensor], [ops.Slice(keep)], backend="cpu")
        assert torch.equal(bits(tensor), bits(wanted))


@pytest.mark.parametrize("within", [False, True])
def test_many_tensors_in_one_call(within) -> None:
    rng = torch.Generator().manual_seed(8)
    shapes = [(30, 20), (7,), (64, 32, 3, 3), (1, 1), (5, 300), (40, 2, 2)]
    tensors = [torch.randn(shape, generator=rng) for shape in shapes]
    slices = [ops.Slice({d: random_keep(n, rng) for d, n in enumerate(shape[:2])}) for shape in shapes]
    wanted = [expected(t, s.keep) for t, s in zip(tensors, slices)]
    with machine(7, within=within):
        ops.slice_channels_(tensors, slices, backend="cpu")
    assert all(torch.equal(t, w) for t, w in zip(tensors, wanted))


def test_every_output_byte_is_written() -> None:
    """PyTorch fills fresh memory with NaN here, so that an unwritten element shows."""
    rng = torch.Generator().manual_seed(1)
    tensor = torch.randn(130, 70, 3, 3, generator=rng)
    torch.use_deterministic_algorithms(True)
    try:
        ops.slice_channels_([tensor], [ops.Slice({0: random_keep(130, rng, 77), 1: random_keep(70, rng, 33)})])
    finally:
        torch.use_deterministic_algorithms(False)
    assert not tensor.isnan().any()


def test_the_tensor_stays_itself() -> None:
    parameter = torch.nn.Parameter(torch.randn(8, 6, 3, 3).to(memory_format=torch.channels_last))
    frozen = torch.nn.Parameter(torch.randn(8), requires_grad=False)
    parameter.grad = torch.randn(8, 6, 3, 3)
    seen = []
    parameter.register_post_accumulate_grad_hook(lambda p: seen.append(tuple(p.shape)))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    keep = ops.Slice({0: torch.tensor([1, 4, 5]), 1: torch.tensor([0, 5])})
    identity, grad = id(parameter), parameter.grad
    parameter.grad = None
    ops.slice_channels_([parameter, grad, frozen], [keep, keep, ops.Slice({0: torch.tensor([1, 4, 5])})])
    assert id(parameter) == identity
    assert optimizer.param_groups[0]["params"][0] is parameter
    assert (parameter.requires_grad, frozen.requires_grad) == (True, False)
    assert parameter.is_contiguous(memory_format=torch.channels_last)
    assert parameter.untyped_storage().nbytes() == 3 * 2 * 9 * 4
    parameter.square().sum().backward()
    assert seen == [(3, 2, 3, 3)]


@pytest.mark.parametrize("size", [100, 1000])
def test_the_storage_shrinks(size) -> None:
    tensors = [torch.ones(size, size) for _ in range(3)]
    half = ops.Slice({0: torch.arange(0, size, 2)})
    ops.slice_channels_(tensors, [half] * 3)
    assert [t.untyped_storage().nbytes() for t in tensors] == [size * size * 2] * 3


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_goes_back_to_the_system() -> None:
    tensor = torch.ones(4096, 4096)
    before = resident()
    ops.slice_channels_([tensor], [ops.Slice({0: torch.arange(1024)})], backend="cpu")
    assert before - resident() > 40e6
    assert (tensor == 1).all()


def test_a_sliced_tensor_can_be_copied_saved_and_sliced_again(tmp_path) -> None:
    tensor = torch.arange(1024 * 1024.0).view(1024, 1024)
    wanted = tensor[::2, 1::2][::3].clone()
    ops.slice_channels_([tensor], [ops.Slice({0: torch.arange(0, 1024, 2), 1: torch.arange(1, 1024, 2)})])
    assert torch.equal(copy.deepcopy(tensor)[::3], wanted)
    torch.save(tensor, tmp_path / "t.pt")
    assert (tmp_path / "t.pt").stat().st_size < 1.1 * 512 * 512 * 4
    assert torch.equal(torch.load(tmp_path / "t.pt", weights_only=True)[::3], wanted)
    ops.slice_channels_([tensor], [ops.Slice({0: torch.arange(0, 512, 3)})])
    assert torch.equal(tensor, wanted)


def test_memory_that_others_see_is_never_written(tmp_path) -> None:
    """An alias, a NumPy array and a file keep their contents; the tensor gets memory of its own."""
    half = ops.Slice({0: torch.arange(1, 1024, 2)})
    aliased = torch.arange(1024 * 1024.0).view(1024, 1024)
    alias, array = aliased.detach(), np.arange(1024 * 1024, dtype=np.float32).reshape(1024, 1024)
    path = tmp_path / "weights.bin"
    path.write_bytes(array.tobytes())
    mapped = torch.from_file(str(path), shared=True, size=1024 * 1024).view(1024, 1024)
    for tensor in (aliased, torch.from_numpy(array), mapped):
        ops.slice_channels_([tensor], [half], backend="cpu")
        assert torch.equal(tensor, alias[1::2])
    assert torch.equal(alias.flatten(), torch.arange(1024 * 1024.0))
    assert np.array_equal(array.ravel(), np.arange(1024 * 1024))
    assert path.read_bytes() == array.tobytes()


def test_new_memory_is_for_small_tensors_and_those_that_others_see(monkeypatch) -> None:
    """All of it is there before the first tensor changes; others that own their memory need none."""
    tensors = [torch.ones(n, 100) for n in (60, 200, 50, 4000, 10)]
    aliases = [tensors[1].detach(), torch.from_dlpack(tensors[2])]
    taken = []
    allocate = ops.reference.empty_like
    monkeypatch.setattr(cpu.reference, "empty_like", lambda t, shape: taken.append(len(t)) or allocate(t, shape))
    steps = slice_steps(tensors, [ops.Slice({1: torch.arange(90)})] * len(tensors), backend="cpu")
    assert taken == [200, 50, 10]
    assert all(t.shape[1] == 100 for t in tensors)
    for step in steps:
        step()
    assert all(t.shape[1] == 90 and t.untyped_storage().nbytes() == len(t) * 90 * 4 for t in tensors)
    assert all(a.shape[1] == 100 and (a == 1).all() for a in aliases)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_row_scale_rounds_as_pytorch_does(dtype) -> None:
    """Every half-precision value, times factors that lead into subnormals, ties and overflow."""
    factors = torch.tensor([1.0, 0.5, 2.0**-12, 3.0, 1.0009765625, 1e4, 1e-7, -1.5])
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    tensor = every[every.isfinite()].expand(len(factors), -1).clone()
    wanted = (tensor.float() * factors[:, None]).to(dtype)
    ops.slice_channels_([tensor], [ops.Slice({}, scale=factors)], backend="cpu")
    assert torch.equal(tensor, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep_rows", [False, True])
@pytest.mark.parametrize("shape", [(12, 10), (12,), (12, 5, 3, 3)])
def test_row_scale_equals_the_reference(shape, keep_rows, dtype) -> None:
    rng = torch.Generator().manual_seed(2)
    tensor = torch.randn(shape, generator=rng).to(dtype)
    keep = {0: random_keep(12, rng, 7)} if keep_rows else {}
    if len(shape) > 1:
        keep[1] = random_keep(shape[1], rng, 3)
    piece = ops.Slice(keep, scale=torch.rand(7 if keep_rows else 12, generator=rng, dtype=torch.float64))
    wanted = tensor.clone()
    ops.reference.slice_channels_([wanted], [piece])
    ops.slice_channels_([tensor], [piece], backend="cpu")
    assert torch.equal(tensor, wanted)


def test_more_than_two_dims_are_served_too() -> None:
    tensor = torch.randn(6, 5, 4, 3)
    keep = {0: torch.tensor([0, 5]), 1: torch.tensor([1, 2]), 2: torch.tensor([3])}
    wanted = tensor[[0, 5]][:, [1, 2]][:, :, [3]]
    ops.slice_channels_([tensor], [ops.Slice(keep)], backend="cpu")
    assert torch.equal(tensor, wanted)


def test_nothing_to_slice_changes_nothing() -> None:
    ops.slice_channels_([], [])
    tensor = torch.randn(5, 4)
    before = tensor.clone()
    ops.slice_channels_([tensor], [ops.Slice({})])
    assert torch.equal(tensor, before)


def kept(*indices: int) -> torch.Tensor:
    return torch.tensor(indices, dtype=torch.int64)


@pytest.mark.parametrize(
    ("piece", "error", "message"),
    [
        (ops.Slice({0: kept()}), ValueError, "tensor 1, dim 0: no index is kept"),
        (ops.Slice({0: kept(1, 0)}), ValueError, "sorted"),
        (ops.Slice({0: kept(1, 1)}), ValueError, "unique"),
        (ops.Slice({0: kept(-1, 1)}), ValueError, "not negative"),
        (ops.Slice({0: kept(0, 4)}), ValueError, "index 4 is out of range for size 4"),
        (ops.Slice({1: kept(0, 3)}), ValueError, "index 3 is out of range for size 3"),
        (ops.Slice({2: kept(0)}), ValueError, "has no dim 2"),
        (ops.Slice({-1: kept(0)}), ValueError, "has no dim -1"),
        (ops.Slice({0: kept(0).int()}), TypeError, "1-D int64"),
        (ops.Slice({0: kept(0)[None]}), TypeError, "1-D int64"),
        (ops.Slice({0: kept(0, 1)}, scale=torch.ones(3)), ValueError, r"shape \(2,\)"),
        (ops.Slice({0: kept(0, 1)}, scale=kept(1, 1)), ValueError, "floating point"),
    ],
)
def test_a_wrong_slice_is_refused_before_any_tensor_changes(piece, error, message) -> None:
    tensors = [torch.randn(4, 3), torch.randn(4, 3)]
    before = [t.clone() for t in tensors]
    with pytest.raises(error, match=message):
        ops.slice_channels_(tensors, [ops.Slice({0: kept(0)}), piece])
    assert all(torch.equal(a, b) for a, b in zip(tensors, before))


def test_views_shared_memory_and_repeats_are_refused() -> None:
    base, first = torch.randn(8, 3), ops.Slice({0: kept(0)})
    before = base.clone()
    for tensors, message in [
        ([base[:4]], "view of a larger storage"),
        ([base[4:]], "view of a larger storage"),
        ([base, base], "share memory|the same"),
        ([base, base.view(3, 8)], "share memory"),
        ([torch.ones(1, 3).expand(4, 3)], "not dense"),
        ([torch.ones(4, 3, requires_grad=True) * 2], "only leaves"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.slice_channels_(tensors, [first] * len(tensors))
    assert torch.equal(base, before)
    with pytest.raises(ValueError, match="1 tensors for 2 slices"):
        ops.slice_channels_([base], [first, first])
    with pytest.raises(TypeError, match="only floating-point rows"):
        ops.slice_channels_([torch.ones(2, dtype=torch.int64)], [ops.Slice({}, scale=torch.ones(2))])


def test_a_backend_that_cannot_serve_is_an_error_by_name() -> None:
    tensor = torch.randn(4)
    with pytest.raises(ops.BackendError, match="cuda"):
        ops.slice_channels_([tensor], [ops.Slice({0: kept(0)})], backend="cuda")
    with pytest.raises(ops.BackendError, match="no backend 'fast'"):
        ops.slice_channels_([tensor], [ops.Slice({0: kept(0)})], backend="fast")
    assert tensor.shape == (4,)


def test_meta_tensors_get_their_new_shape() -> None:
    tensor = torch.empty(8, 6, device="meta")
    ops.slice_channels_([tensor], [ops.Slice({0: kept(1, 2), 1: kept(5)})])
    assert tensor.shape == (2, 1)
