"""slice_channels on a GPU: every table to the bit as the reference, in place, on the caller's stream."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from diffprune_fast import ops

DTYPES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.complex128)

pytestmark = pytest.mark.gpu


def random_tensor(shape: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, device=device).to(dtype)
    size = torch.empty((), dtype=dtype).element_size()
    n = int(torch.tensor(shape).prod()) * size
    return torch.randint(0, 256, (n,), dtype=torch.uint8, device=device).view(dtype).reshape(shape)


def random_keep(size: int, rng: random.Random) -> Tensor:
    share = rng.choice([0.02, 0.3, 0.5, 0.7, 0.95])
    kept = sorted(i for i in range(size) if rng.random() < share)
    return torch.tensor(kept or [rng.randrange(size)])


def random_case(rng: random.Random, device: torch.device) -> tuple[Tensor, ops.Slice]:
    dims = rng.choice([1, 2, 2, 4, 4])
    large = rng.choice([8, 70, 300]) if dims > 1 else 5000
    shape = [rng.randint(1, large) for _ in range(min(dims, 2))] + ([rng.choice([1, 3])] * 2 if dims == 4 else [])
    dtype = rng.choice(DTYPES)
    tensor = random_tensor(shape, dtype, device)
    if dims == 4 and rng.random() < 0.5:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    keep = {d: random_keep(shape[d], rng) for d in range(len(shape[:2])) if rng.random() < 0.8}
    scale = None
    if dtype.is_floating_point and rng.random() < 0.3:
        scale = torch.rand(len(keep[0]) if 0 in keep else shape[0]) + 0.5
    return tensor, ops.Slice(keep, scale)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def assert_sliced(tensors: list[Tensor], slices: list[ops.Slice]) -> None:
    expected = [ops.reference.slice_channels(t.detach(), s) for t, s in zip(tensors, slices)]
    ops.slice_channels_(tensors, slices)
    for tensor, want in zip(tensors, expected):
        assert tensor.shape == want.shape
        assert [s for s, n in zip(tensor.stride(), want.shape) if n > 1] == [
            s for s, n in zip(want.stride(), want.shape) if n > 1
        ]
        assert torch.equal(bits(tensor), bits(want))
        assert tensor.untyped_storage().nbytes() == want.numel() * want.element_size()


def test_random_tables_are_sliced_to_the_bit(device: torch.device, repeats: int) -> None:
    rng = random.Random(0)
    for _ in range(repeats):
        cases = [random_case(rng, device) for _ in range(rng.randint(1, 6))]
        assert_sliced([t for t, _ in cases], [s for _, s in cases])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_hundred_runs_give_the_same_bits(device: torch.device, dtype: torch.dtype) -> None:
    rng = random.Random(1)
    shapes = [[640, 320, 3, 3], [1280, 640], [1280], [320, 2560]] if device.type == "cuda" else [[64, 32, 3, 3], [128]]
    originals = [random_tensor(s, dtype, device) for s in shapes]
    slices = [ops.Slice({d: random_keep(n, rng) for d, n in enumerate(s[:2])}) for s in shapes]
    expected = [ops.reference.slice_channels(t, s) for t, s in zip(originals, slices)]
    for _ in range(100):
        tensors = [t.clone() for t in originals]
        ops.slice_channels_(tensors, slices)
        assert all(torch.equal(t, e) for t, e in zip(tensors, expected))


@pytest.mark.parametrize("dropped", [0, -1])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_single_dropped_channel_of_a_large_tensor(device: torch.device, dropped: int, dim: int) -> None:
    n = 8192 if device.type == "cuda" else 256
    kept = torch.arange(1, n) if dropped == 0 else torch.arange(n - 1)
    for _ in range(5):
        assert_sliced([torch.randn(n, n, device=device)], [ops.Slice({dim: kept})])


def test_parameters_stay_who_they_are(device: torch.device) -> None:
    layer = torch.nn.Conv2d(64, 96, 3, device=device)
    weight, kept = layer.weight, torch.arange(0, 96, 2)
    weight.grad = torch.randn_like(weight)
    ops.slice_channels_([weight, weight.grad], [ops.Slice({0: kept})] * 2)
    assert layer.weight is weight
    assert weight.requires_grad
    assert weight.is_leaf
    assert weight.shape == weight.grad.shape == (48, 64, 3, 3)
    layer.bias = None
    layer(torch.randn(1, 64, 8, 8, device=device)).sum().backward()


@pytest.mark.needs_cuda
def test_no_more_memory_than_the_largest_tensor() -> None:
    tensors = [torch.randn(2048, 2048, device="cuda") for _ in range(16)]
    largest = tensors[0].numel() * 4
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.slice_channels_(tensors, [ops.Slice({0: torch.arange(0, 2048, 2), 1: torch.arange(1500)})] * 16)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= largest
    assert torch.cuda.memory_allocated() < before / 2


@pytest.mark.needs_cuda
def test_it_works_on_the_callers_stream() -> None:
    original = torch.randn(4096, 4096, device="cuda")
    piece = ops.Slice({0: torch.arange(0, 4096, 3), 1: torch.arange(1, 4096, 2)})
    expected = ops.reference.slice_channels(original, piece)
    ops.slice_channels_([torch.randn(8, 8, device="cuda")], [ops.Slice({0: torch.arange(3)})])  # loads the kernel
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        tensor = original.clone()
        ops.slice_channels_([tensor], [piece])
        assert not stream.query()
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(tensor, expected)


@pytest.mark.needs_cuda
def test_memory_of_another_stream_is_not_given_back_while_it_is_read() -> None:
    stream, other = torch.cuda.Stream(), torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        tensor = torch.randn(4096, 4096, device="cuda")
    other.wait_stream(stream)
    piece = ops.Slice({0: torch.arange(0, 4096, 2), 1: torch.arange(1, 4096, 2)})
    expected = ops.reference.slice_channels(tensor, piece)
    torch.cuda._sleep(100_000_000)  # on the default stream, before the kernel
    ops.slice_channels_([tensor], [piece])
    with torch.cuda.stream(stream):
        torch.full((4096, 4096), torch.nan, device="cuda")  # takes the old memory, if it is free
    torch.cuda.synchronize()
    assert torch.equal(tensor, expected)


@pytest.mark.needs_cuda
def test_the_cuda_extension_serves() -> None:
    assert ops.backends()["slice_channels/cuda"] == "ok"
