"""The CUDA slicing kernel on the host: its index arithmetic, its order of blocks, and the kernel itself as threads.

What only a GPU can show is tested in tests/gpu.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffprune_fast.ops import cuda, reference, slice_tables
from diffprune_fast.ops.slice_channels import Slice, sliced_shape

CSRC = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
SCHEDULES = {"random": 0, "newest first": 1, "oldest starves": 2, "writes first": 3, "oldest first": 4}
DONE, DEADLOCK, OVERWRITTEN, OUT_OF_ROOM = range(4)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ctypes.CDLL]:
    """Compiles a file of csrc/cuda with the host's compiler and loads it."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("host")

    def load(name: str) -> ctypes.CDLL:
        library = folder / f"{name}.so"
        command = [
            *compiler.split(),
            "-std=c++17",
            "-O1",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-Wno-unknown-pragmas",
            "-shared",
            "-fPIC",
            "-pthread",
        ]
        subprocess.run([*command, str(CSRC / f"{name}.cpp"), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))

    return load


@pytest.fixture(scope="session")
def kernel(compiled: Callable[[str], ctypes.CDLL]) -> ctypes.CDLL:
    """host_simulation.cpp: the kernel's steps, advanced one at a time in an order of our choice."""
    loaded = compiled("host_simulation")
    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    loaded.simulate.argtypes = [pointer, i64, pointer, i64, i64, i64, ctypes.c_uint64, i64]
    loaded.conflicts.argtypes = [pointer, i64, pointer]
    loaded.quotient_is_exact.argtypes = [i64]
    for function in (loaded.simulate, loaded.quotient_is_exact, loaded.entry_bytes):
        function.restype = i64
    return loaded


@pytest.fixture(scope="session")
def threads(compiled: Callable[[str], ctypes.CDLL]) -> ctypes.CDLL:
    """host_kernel.cpp: the kernel as it is written, its blocks as threads."""
    loaded = compiled("host_kernel")
    loaded.run_kernel.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    loaded.run_kernel.restype = None
    return loaded


def keep(size: int, generator: torch.Generator, share: float = 0.6) -> Tensor:
    kept = (torch.rand(size, generator=generator) < share).nonzero().flatten()
    return kept if kept.numel() else torch.tensor([size - 1])


def random_tensor(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (int(np.prod(shape)) * size,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(tuple(shape))


def placed(tables: slice_tables.SliceTables) -> np.ndarray:
    return tables.placed(tables.indices.ctypes.data, [s.data_ptr() for _, s in tables.scales])


def run(
    kernel: ctypes.CDLL,
    tensors: Sequence[Tensor],
    slices: Sequence[Slice],
    *,
    schedule: str = "random",
    blocks: int = 8,
    seed: int = 0,
    slack: int = 0,
) -> int:
    tables, left = slice_tables.build(tensors, slices)
    assert left == []
    entries = placed(tables)
    return kernel.simulate(
        entries.ctypes.data, len(entries), tables.tile_entry.ctypes.data, len(tables.tile_entry),
        blocks, SCHEDULES[schedule], seed, slack,
    )  # fmt: skip


def same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = a.contiguous(), b.contiguous()
    return a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def assert_sliced(kernel: ctypes.CDLL, tensors: Sequence[Tensor], slices: Sequence[Slice], **options: object) -> None:
    expected = [reference.slice_channels(t, s) for t, s in zip(tensors, slices)]
    assert run(kernel, tensors, slices, **options) == DONE  # type: ignore[arg-type]
    for tensor, piece, want in zip(tensors, slices, expected):
        strides = tensor.stride()
        cuda.shrink(tensor, sliced_shape(tensor, piece))
        assert same_bits(tensor, want)
        assert tensor.untyped_storage().nbytes() == want.numel() * want.element_size()
        order = sorted(range(tensor.dim()), key=lambda d: -strides[d])
        assert all(tensor.stride(a) >= tensor.stride(b) for a, b in itertools.pairwise(order) if tensor.shape[b] > 1)


# rows of every kind: shorter and longer than a tile, multiples of 16 bytes and not, a 3x3 and a 1x1 kernel
SHAPES = [(1,), (7,), (5000,), (64, 64), (37, 41), (3, 9001), (300, 3), (12, 10, 3, 3), (16, 520, 3, 3), (40, 16, 1, 1)]


@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "element", [torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.complex128], ids=str
)
def test_every_dtype_and_shape_is_sliced_exactly(
    kernel: ctypes.CDLL, shape: tuple[int, ...], dims: tuple[int, ...], element: torch.dtype
) -> None:
    if max(dims) >= len(shape):
        dims = (0,)
    generator = torch.Generator().manual_seed(len(shape))
    piece = Slice({d: keep(shape[d], generator) for d in dims})
    assert_sliced(kernel, [random_tensor(shape, element, generator)], [piece])


@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1), (2,), (1, 3)], ids=str)
def test_channels_last_stays(kernel: ctypes.CDLL, dims: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    tensor = torch.randn(48, 70, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last)
    assert_sliced(kernel, [tensor], [Slice({d: keep(tensor.shape[d], generator) for d in dims})])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("blocks", [1, 2, 7, 64])
def test_no_schedule_overwrites_what_is_unread(kernel: ctypes.CDLL, schedule: str, blocks: int) -> None:
    generator = torch.Generator().manual_seed(blocks)
    shapes = [(90, 700), (700, 90), (24, 16, 3, 3), (6, 12000), (400,), (90, 700), (33, 1024)]
    for seed in range(3):
        tensors = [random_tensor(s, torch.float32, generator) for s in shapes]
        slices = [Slice({d: keep(n, generator, 0.9) for d, n in enumerate(s[:2])}) for s in shapes]
        assert_sliced(kernel, tensors, slices, schedule=schedule, blocks=blocks, seed=seed)


@pytest.mark.parametrize("dropped", ["first", "last"])
def test_a_single_dropped_row_is_the_tightest_case(kernel: ctypes.CDLL, dropped: str) -> None:
    generator = torch.Generator().manual_seed(0)
    kept = torch.arange(1, 200) if dropped == "first" else torch.arange(199)
    for schedule in SCHEDULES:
        tensor = random_tensor((200, 256), torch.float32, generator)
        assert_sliced(kernel, [tensor], [Slice({0: kept})], schedule=schedule, blocks=16)


def test_the_simulation_sees_a_block_that_waits_for_too_little(kernel: ctypes.CDLL) -> None:
    generator = torch.Generator().manual_seed(0)
    outcomes = set()
    for schedule in SCHEDULES:
        for seed in range(5):
            tensor = random_tensor((200, 256), torch.float32, generator)
            piece = Slice({0: torch.arange(1, 200)})
            outcomes.add(run(kernel, [tensor], [piece], schedule=schedule, blocks=16, seed=seed, slack=1))
    assert OVERWRITTEN in outcomes


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    dims=st.sets(st.integers(0, 3), max_size=2),
    element=st.sampled_from([torch.uint8, torch.float16, torch.float32, torch.float64]),
    share=st.sampled_from([0.1, 0.5, 0.95]),
    schedule=st.sampled_from(sorted(SCHEDULES)),
    blocks=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_random_tables(
    kernel: ctypes.CDLL,
    shape: list[int],
    dims: set[int],
    element: torch.dtype,
    share: float,
    schedule: str,
    blocks: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    piece = Slice({d: keep(shape[d], generator, share) for d in sorted(dims) if d < len(shape)})
    tensors = [random_tensor(shape, element, generator) for _ in range(2)]
    assert_sliced(kernel, tensors, [piece, piece], schedule=schedule, blocks=blocks, seed=seed)


def run_threads(threads: ctypes.CDLL, tensors: Sequence[Tensor], slices: Sequence[Slice], blocks: int = 3) -> None:
    """Slice with the kernel itself, and compare with the reference to the bit."""
    expected = [reference.slice_channels(t, s) for t, s in zip(tensors, slices)]
    tables, left = slice_tables.build(tensors, slices)
    assert left == []
    entries = placed(tables)
    threads.run_kernel(
        entries.ctypes.data, len(entries), tables.tile_entry.ctypes.data, len(tables.tile_entry), blocks
    )  # fmt: skip
    for tensor, piece, want in zip(tensors, slices, expected):
        cuda.shrink(tensor, sliced_shape(tensor, piece))
        assert same_bits(tensor, want)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex128], ids=str
)
def test_the_kernel_itself_slices_every_kind_of_row(threads: ctypes.CDLL, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1,), (700,), (64, 64), (37, 41), (3, 9001), (12, 10, 3, 3), (4, 520, 3, 3), (40, 16, 1, 1), (200, 3)]
    tensors = [random_tensor(s, dtype, generator) for s in shapes]
    tensors += [t.clone(memory_format=torch.channels_last) for t in tensors if t.dim() == 4]
    slices = [Slice({d: keep(n, generator) for d, n in enumerate(t.shape[:2])}) for t in tensors]
    run_threads(threads, tensors, slices)
    run_threads(threads, [random_tensor((300, 96), dtype, generator)], [Slice({0: keep(300, generator)})])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_the_kernel_itself_scales_rows(threads: ctypes.CDLL, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape, dims in (((40, 96), (0, 1)), ((40, 96), (0,)), ((40, 96), (1,)), ((40,), (0,)), ((20, 8, 3, 3), ())):
        tensor = torch.randn(shape, generator=generator).to(dtype)
        piece = {d: keep(shape[d], generator) for d in dims}
        scale = torch.rand(len(piece[0]) if 0 in piece else shape[0], generator=generator) + 0.5
        run_threads(threads, [tensor], [Slice(piece, scale)])


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_blocks_of_the_kernel_itself_do_not_run_over_each_other(threads: ctypes.CDLL, blocks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for piece in (Slice({0: torch.arange(1, 300)}), Slice({1: torch.arange(1, 256)})):
        run_threads(threads, [random_tensor((300, 256), torch.float32, generator)], [piece], blocks)


def test_the_kernel_itself_reads_nothing_beyond_a_tensor(threads: ctypes.CDLL) -> None:
    # rows that start and end between two multiples of 16 bytes, in a memory whose surroundings must not change
    memory = torch.arange(5000, dtype=torch.float32)
    before = memory.clone()
    tensor = memory[3 : 3 + 37 * 41].view(37, 41)
    kept = torch.arange(0, 37, 2)
    tables, _ = slice_tables.build([tensor], [Slice({0: kept, 1: torch.arange(40)})])
    entries = placed(tables)
    threads.run_kernel(entries.ctypes.data, 1, tables.tile_entry.ctypes.data, len(tables.tile_entry), 2)
    n = 19 * 40
    assert torch.equal(memory[3 : 3 + n], before[3 : 3 + 37 * 41].view(37, 41)[kept][:, :40].flatten())
    assert torch.equal(memory[:3], before[:3])
    assert torch.equal(memory[3 + 37 * 41 :], before[3 + 37 * 41 :])


@pytest.mark.parametrize(
    ("shape", "dims"),
    [((60, 900), (0, 1)), ((5, 30000), (1,)), ((31, 20, 9), (0, 2)), ((9, 40, 11, 30), (1, 3))],
    ids=str,
)
@pytest.mark.parametrize("share", [0.05, 0.5, 0.97])
def test_a_tile_waits_for_every_conflict_and_for_nothing_that_starts_behind(
    kernel: ctypes.CDLL, shape: tuple[int, ...], dims: tuple[int, ...], share: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    tensor = torch.empty(shape)
    tables, _ = slice_tables.build([tensor], [Slice({d: keep(shape[d], generator, share) for d in dims})])
    entry, out = placed(tables), np.zeros(3, np.int64)
    for tile in range(len(tables.tile_entry)):
        kernel.conflicts(entry.ctypes.data, tile, out.ctypes.data)
        waits_for, real, starts_below = out.tolist()
        assert real <= waits_for <= starts_below


def test_division_by_multiplication_is_exact(kernel: ctypes.CDLL) -> None:
    assert all(kernel.quotient_is_exact(d) for d in range(1, slice_tables.STAGE_BYTES + 1))


def test_python_and_cpp_agree_on_the_layout_of_an_entry(kernel: ctypes.CDLL) -> None:
    assert kernel.entry_bytes() == slice_tables.ENTRY.itemsize
    header = (CSRC / "slice_index.h").read_text()
    body = header[header.index("struct TiledEntry {") : header.index("constexpr int kEntryFields")]
    code = re.sub(r"//.*", "", body)
    names = [n.strip() for line in re.findall(r"int64_t ([^;]+);", code) for n in line.split(",")]
    assert tuple(names) == slice_tables.ENTRY.names
    assert f"kStageBytes = {slice_tables.STAGE_BYTES // 1024} * 1024" in header


def test_shared_index_tables_are_stored_once() -> None:
    kept = torch.arange(0, 64, 2)
    tensors = [torch.empty(64, 32) for _ in range(50)]
    tables, _ = slice_tables.build(tensors, [Slice({0: kept})] * 50)
    assert len(tables.indices) == 32 + 65 + 1


@pytest.mark.parametrize(
    ("tensor", "piece"),
    [
        (torch.empty(4, 4, 4), Slice({0: torch.tensor([1]), 1: torch.tensor([1]), 2: torch.tensor([1])})),
        (torch.empty(3, 3, 20000), Slice({0: torch.tensor([1]), 1: torch.tensor([1])})),
    ],
    ids=["three dims", "a row's index longer than a tile"],
)
def test_what_the_kernel_can_not_slice_is_left_to_the_reference(tensor: Tensor, piece: Slice) -> None:
    tables, left = slice_tables.build([tensor], [piece])
    assert left == [0]
    assert len(tables.tile_entry) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_scaled_rows_know_their_factor(dtype: torch.dtype) -> None:
    scale = torch.rand(5)
    tables, left = slice_tables.build(
        [torch.empty(8, 6, dtype=dtype)], [Slice({0: torch.tensor([0, 2, 3, 5, 7]), 1: torch.arange(3)}, scale)]
    )
    (row, values), entry = tables.scales[0], tables.entries[0]
    assert left == []
    assert row == 0
    assert entry["scale_period"] == 3
    assert entry["straight"] == 0
    torch.testing.assert_close(values, scale.to(values.dtype))


def test_without_a_driver_the_reason_is_given() -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    reason = cuda.availability()
    assert "not built" in reason or "no CUDA device" in reason


@pytest.mark.skipif(cuda._cuda is None, reason="the CUDA extension is not built here (no nvcc)")
def test_a_call_without_a_driver_names_operation_place_and_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    with pytest.raises(
        cuda._cuda.CudaError, match=r"slice_channels_: .* at .*slice_channels\.cu:\d+ failed: cudaError\w+"
    ):
        cuda._cuda.slice_channels(0, 0, 1, 0, 0, 0, 0, 0)
