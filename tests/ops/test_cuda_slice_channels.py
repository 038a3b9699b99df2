"""The CUDA slicing kernel on the host: its tables, its index arithmetic, and the whole call with the kernel as C++.

What only a GPU can show is tested in tests/gpu.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffprune_fast.ops import cuda, reference, slice_tables
from diffprune_fast.ops.slice_channels import Slice

CSRC = Path(__file__).resolve().parents[2] / "csrc" / "cuda"


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """host_kernel.cpp: what makes the tables, and what the kernel's threads do, compiled by the host's compiler."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("host") / "host_kernel.so"
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command = [*compiler.split(), "-std=c++17", "-O1", *warnings, "-shared", "-fPIC"]
    subprocess.run([*command, str(CSRC / "host_kernel.cpp"), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    loaded.fill.argtypes = [pointer, i64, *[pointer] * 4]
    loaded.run_kernel.argtypes = [pointer, pointer, i64, i64]
    loaded.run_kernel.restype = None
    for function in (loaded.fill, loaded.entry_bytes, loaded.most_rows):
        function.restype = i64
    return loaded


def keep(size: int, generator: torch.Generator, share: float = 0.6) -> Tensor:
    kept = (torch.rand(size, generator=generator) < share).nonzero().flatten()
    return kept if kept.numel() else torch.tensor([size - 1])


def random_tensor(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (int(np.prod(shape)) * size,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(tuple(shape))


def same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = a.contiguous(), b.contiguous()
    return a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def gathered(kernel: ctypes.CDLL, tensors: Sequence[Tensor], slices: Sequence[Slice]) -> list[Tensor]:
    """What the kernel makes of tensors, between guard bytes that it must not touch; unchanged ones as they are."""
    tables = slice_tables.build(tensors, slices, kernel.fill)
    assert (tables.tiles >= 0).all()
    tables.place(tables.indices.ctypes.data, [s.data_ptr() for _, s in tables.scales])
    out, guarded = [], []
    for i, (tensor, shape) in enumerate(zip(tensors, tables.shapes)):
        like = reference.empty_like(tensor, shape)
        bytes_ = torch.full((like.numel() * like.element_size() + 64,), 0xA5, dtype=torch.uint8)
        inner = bytes_[32:-32].view(tensor.dtype)
        out.append(inner.as_strided(like.shape, like.stride()) if tables.tiles[i] else tensor)
        guarded.append(bytes_)
        tables.entries["target"][i] = inner.data_ptr()
    kernel.run_kernel(tables.entries.ctypes.data, tables.tile_entry.ctypes.data, 0, len(tables.tile_entry))
    assert all(bool((g[:32] == 0xA5).all()) and bool((g[-32:] == 0xA5).all()) for g in guarded)
    return out


def assert_sliced(kernel: ctypes.CDLL, tensors: Sequence[Tensor], slices: Sequence[Slice]) -> None:
    for out, tensor, piece in zip(gathered(kernel, tensors, slices), tensors, slices):
        want = reference.slice_channels(tensor, piece)
        assert same_bits(out, want)
        assert [s for s, n in zip(out.stride(), out.shape) if n > 1] == [
            s for s, n in zip(want.stride(), want.shape) if n > 1
        ]


# rows of every kind: one, shorter and longer than a block, multiples of 16 bytes and not, a 3x3 and a 1x1 kernel
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


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    order=st.permutations(range(5)),
    dims=st.sets(st.integers(0, 4), max_size=2),
    element=st.sampled_from([torch.uint8, torch.float16, torch.float32, torch.float64]),
    share=st.sampled_from([0.1, 0.5, 0.95]),
    offset=st.integers(0, 3),
)
def test_random_tables(
    kernel: ctypes.CDLL,
    shape: list[int],
    order: list[int],
    dims: set[int],
    element: torch.dtype,
    share: float,
    offset: int,
) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    while int(np.prod(shape)) > 50_000:
        shape[int(np.argmax(shape))] //= 2
    piece = Slice({d: keep(shape[d], generator, share) for d in sorted(dims) if d < len(shape)})
    # anywhere in memory and in any order of dims
    tensors = [
        random_tensor([int(np.prod(shape)) + offset], element, generator)[offset:].reshape(shape),
        random_tensor(shape, element, generator),
    ]
    order = [d for d in order if d < len(shape)]
    back = [order.index(d) for d in range(len(order))]
    tensors.append(tensors[1].permute(order).contiguous().permute(back))
    assert_sliced(kernel, tensors, [piece] * 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_rows_are_scaled_on_the_way(kernel: ctypes.CDLL, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape, dims in (
        ((40, 96), (0, 1)), ((40, 96), (0,)), ((40, 96), (1,)), ((400,), (0,)), ((20, 8, 3, 3), ()), ((30, 5), (0,)),
    ):  # fmt: skip
        tensor = torch.randn(shape, generator=generator).to(dtype)
        piece = {d: keep(shape[d], generator) for d in dims}
        scale = torch.rand(len(piece[0]) if 0 in piece else shape[0], generator=generator) + 0.5
        assert_sliced(kernel, [tensor], [Slice(piece, scale)])


def test_neighbours_that_stay_together_go_by_sixteen_bytes(kernel: ctypes.CDLL) -> None:
    rows, half = Slice({0: torch.arange(0, 64, 2)}), Slice({1: torch.arange(0, 64, 2)})
    memory = torch.empty(64 * 64 + 1, dtype=torch.bfloat16)
    units = []
    for tensor, piece in (
        (memory[:-1].view(64, 64), rows), (memory[1:].view(64, 64), rows), (memory[:-1].view(64, 64), half),
        (torch.empty(8, 64, 4, dtype=torch.bfloat16), half), (torch.empty(8, 64, 3, 3), half),
    ):  # fmt: skip
        units.append(1 << int(slice_tables.build([tensor], [piece], kernel.fill).entries["log2_unit"][0]))
    # whole rows; from an odd address; single elements; four of them; nine, of which no two lie evenly
    assert units == [16, 2, 2, 8, 4]


def test_rows_of_a_tile_are_as_many_as_threads_can_work_out(kernel: ctypes.CDLL) -> None:
    for width in (1, 2, 3, 8, 31, 33, 300):
        tensor = torch.empty(10_000, width + 1, dtype=torch.uint8)
        piece = Slice({0: torch.arange(9_000), 1: torch.arange(width)})
        entry = slice_tables.build([tensor], [piece], kernel.fill).entries[0]
        assert entry["rows_per_tile"] <= kernel.most_rows()


def test_python_and_cpp_agree_on_the_layout_of_an_entry(kernel: ctypes.CDLL) -> None:
    assert kernel.entry_bytes() == slice_tables.ENTRY.itemsize
    header = (CSRC / "slice_index.h").read_text()
    body = header[header.index("struct GatherEntry {") : header.index("struct Tile")]
    code = re.sub(r"//.*", "", body)
    names = [n.strip() for line in re.findall(r"int64_t ([^;]+);", code) for n in line.split(",")]
    assert tuple(names) == slice_tables.ENTRY.names
    bound = re.search(r"PYBIND11_NUMPY_DTYPE\(GatherEntry,([^)]+)\)", (CSRC / "bindings.cpp").read_text())
    assert bound is not None
    assert [n.strip() for n in bound[1].split(",")] == names


def test_shared_index_tables_are_stored_once(kernel: ctypes.CDLL) -> None:
    kept = np.arange(0, 64, 2)
    tensors = [torch.empty(64, 32) for _ in range(50)]
    slices = [Slice({0: torch.from_numpy(kept)}) for _ in range(50)]
    assert len(slice_tables.build(tensors, slices, kernel.fill).indices) == 32 + 1


@pytest.mark.parametrize(
    ("tensor", "piece"),
    [
        (torch.empty(4, 4, 4), Slice({0: torch.tensor([1]), 1: torch.tensor([1]), 2: torch.tensor([1])})),
        (torch.empty(4, 4, dtype=torch.complex64), Slice({0: torch.tensor([1])}, torch.ones(1))),
        (torch.empty(4, 3).t(), Slice({1: torch.tensor([1])}, torch.ones(3))),
        (torch.empty(4, 0), Slice({0: torch.tensor([1])})),
    ],
    ids=["three dims", "a scaled complex number", "a scaled dim that isn't the slowest", "nothing in it"],
)
def test_what_the_kernel_can_not_slice_is_left_to_the_reference(
    kernel: ctypes.CDLL, tensor: Tensor, piece: Slice
) -> None:
    tables = slice_tables.build([torch.empty(3), tensor], [Slice({}), piece], kernel.fill)
    assert tables.tiles.tolist() == [0, -1]
    assert len(tables.tile_entry) == 0


@pytest.fixture
def on_the_host(kernel: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """``ops.cuda`` as it is, with the host's kernel behind it and CPU tensors in front."""

    def launch(entries: int, tile_entry: int, first: int, tiles: int, device: int, stream: int) -> None:
        kernel.run_kernel(entries, tile_entry, first, tiles)

    monkeypatch.setattr(cuda, "_cuda", SimpleNamespace(fill_table=kernel.fill, slice_channels=launch))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(device_index=0, cuda_stream=0))
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self.clone())
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)


def many() -> tuple[list[Tensor], list[Slice]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 64), (3,), (300, 200), (64, 32, 3, 3), (7, 7), (128, 128), (9, 9, 9), (1, 1), (40,)] * 3
    tensors = [torch.randn(s, generator=generator) for s in shapes]
    slices = [Slice({d: keep(n, generator, 0.8) for d, n in enumerate(t.shape)}) for t in tensors]
    slices[4] = slices[-2] = Slice({})
    return tensors, slices


@pytest.mark.usefixtures("on_the_host")
def test_the_whole_call_slices_in_batches() -> None:
    tensors, slices = many()
    tensors[0] = torch.nn.Parameter(tensors[0])
    ids, expected = [id(t) for t in tensors], [reference.slice_channels(t.detach(), s) for t, s in zip(tensors, slices)]
    cuda.slice_channels_(tensors, slices)
    assert [id(t) for t in tensors] == ids
    assert tensors[0].requires_grad
    assert tensors[0].is_leaf
    for tensor, want in zip(tensors, expected):
        assert same_bits(tensor.detach(), want)
        assert tensor.untyped_storage().nbytes() == want.numel() * want.element_size()


def test_a_batch_takes_no_more_than_the_largest_tensor(kernel: ctypes.CDLL) -> None:
    tensors, slices = many()
    tables = slice_tables.build(tensors, slices, kernel.fill)
    room = max(t.nbytes for t in tensors)
    found = list(cuda.batches(tensors, tables, room))
    assert [i for batch in found for i in batch] == np.flatnonzero(tables.tiles > 0).tolist()
    sizes = [[int(np.prod(tables.shapes[i])) * 4 for i in batch] for batch in found]
    assert max(map(sum, sizes)) <= room
    # greedy: what comes next didn't fit any more, or couldn't be sliced
    for batch, after, taken in zip(found, found[1:], sizes):
        assert batch.stop < after.start or sum(taken) + int(np.prod(tables.shapes[after.start])) * 4 > room


@pytest.mark.usefixtures("on_the_host")
def test_where_memory_runs_out_every_tensor_is_sliced_or_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, slices = many()
    before = [t.clone() for t in tensors]
    calls = []

    def out_of_memory(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        calls.append(shape)
        if len(calls) > 12:
            raise torch.OutOfMemoryError("no memory")
        return reference.empty_like(tensor, shape)

    monkeypatch.setattr(cuda, "new_memory", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        cuda.slice_channels_(tensors, slices)
    done = [same_bits(t, reference.slice_channels(b, s)) for t, b, s in zip(tensors, before, slices)]
    untouched = [same_bits(t, b) for t, b in zip(tensors, before)]
    assert all(d or u for d, u in zip(done, untouched))
    assert not all(done)


@pytest.mark.usefixtures("on_the_host")
def test_too_little_memory_is_noticed_before_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, slices = many()
    before = [t.clone() for t in tensors]

    def no_room(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch, "empty", no_room)
    with pytest.raises(torch.OutOfMemoryError):
        cuda.slice_channels_(tensors, slices)
    assert all(same_bits(t, b) for t, b in zip(tensors, before))


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
        cuda._cuda.slice_channels(0, 0, 0, 1, 0, 0)
