"""What would crash or corrupt in native code is refused before anything is written, in one way: SliceError by name."""

from __future__ import annotations

import contextlib
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import diffprune_fast as dpf
from diffprune_fast import ops
from diffprune_fast.ops import cpu, dispatch
from diffprune_fast.ops.slice_channels import slice_steps
from diffprune_fast.slicing import SliceError

needs_extension = pytest.mark.skipif(cpu.availability() != "ok", reason=cpu.availability())
X = (torch.zeros(1, 4),)


class Wrapper(Tensor):
    """A tensor that stands for another one, as DTensor and quantized weights do: its own address is none."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Wrapper(args[0])
        raise NotImplementedError(str(func))


def _release(model: nn.Sequential) -> None:
    model[2].weight.untyped_storage().resize_(0)


def _fake(model: nn.Sequential) -> None:
    with FakeTensorMode():
        model[2].weight = nn.Parameter(torch.empty(2, 16))


def _wrap(model: nn.Sequential) -> None:
    model[2].weight = nn.Parameter(Wrapper(torch.empty(2, 16)), requires_grad=False)


def _sparse_gradient(model: nn.Sequential) -> None:
    model[2].weight.grad = torch.zeros(2, 16).to_sparse()


def _released_gradient(model: nn.Sequential) -> None:
    model[2].weight.grad = torch.zeros(2, 16)
    model[2].weight.grad.untyped_storage().resize_(0)


def _widened(model: nn.Sequential) -> None:
    model[2].weight.grad = torch.zeros(2, 32)[:, ::2]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_release, "2.weight of shape .* has no memory: its storage was released"),
        (_fake, "2.weight is a FakeTensor"),
        (_wrap, "2.weight is a Wrapper"),
        (_sparse_gradient, "2.weight.grad is torch.sparse_coo"),
        (_released_gradient, "2.weight.grad of shape .* has no memory"),
        (_widened, "2.weight.grad of shape .* is a view of a larger storage"),
    ],
)
def test_tensors_without_memory_of_their_own_are_refused(
    spoil: Callable[[nn.Sequential], None], words: str, backend: str
) -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    plan = dpf.trace(model, X)
    spoil(model)
    before = model[0].weight.detach().clone()
    with pytest.raises(SliceError, match=words):
        dpf.prune(model, plan, {"0": np.array([0, 3])}, example_inputs=X, backend=backend)
    assert torch.equal(model[0].weight, before)
    assert model[0].out_features == 16


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (8, 0, 3), (0,)])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_dim_of_size_zero_is_no_division_by_it(shape: tuple[int, ...], backend: str) -> None:
    tensor = torch.empty(shape)
    dim = next((d for d, n in enumerate(shape) if n), None)
    keep = {} if dim is None else {dim: torch.tensor([1, 2])}
    scale = torch.ones(2 if dim == 0 else shape[0])
    ops.slice_channels_([tensor], [ops.Slice(keep, scale)], backend=backend)
    assert tensor.shape == tuple(2 if d == dim else n for d, n in enumerate(shape))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_keep_on_meta_is_found_before_the_first_tensor_changes(backend: str) -> None:
    tensors = [torch.ones(4, 3), torch.ones(4, 3)]
    bad = ops.Slice({0: torch.tensor([1, 2]).to("meta")})
    with pytest.raises(TypeError, match="tensor 1, dim 0: kept indices on meta have no values"):
        ops.slice_channels_(tensors, [ops.Slice({0: torch.tensor([0])}), bad], backend=backend)
    assert [t.shape for t in tensors] == [(4, 3)] * 2


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_table_that_changes_after_its_check_changes_nothing(backend: str) -> None:
    tensor, keep, scale = torch.arange(12.0).view(4, 3), torch.tensor([0, 2]), torch.ones(2)
    steps = slice_steps([tensor], [ops.Slice({0: keep}, scale)], backend=backend)
    keep.fill_(10**9)
    scale.fill_(0)
    for step in steps:
        step()
    assert tensor.tolist() == [[0, 1, 2], [6, 7, 8]]


@pytest.mark.parametrize(("first", "changes"), [(0, False), (2, True)])
def test_a_backend_that_runs_out_of_memory_half_way_is_helped_to_the_end(
    monkeypatch: pytest.MonkeyPatch, first: int, changes: bool
) -> None:
    """Such as the CUDA one: nothing has changed, or everything; one of the tensors it can never slice."""
    calls: list[int] = []

    def slice_channels_(tensors: list[Tensor], slices: list[ops.Slice]) -> None:
        calls.append(len(tensors))
        for i, (tensor, piece) in enumerate(zip(tensors, slices)):
            if (len(calls) == 1 and i == first) or len(tensor) == 7:
                raise torch.OutOfMemoryError("no memory")
            ops.reference.slice_channels_([tensor], [piece])

    scarce = types.ModuleType("diffprune_fast.ops.scarce")
    scarce.slice_channels_ = slice_channels_  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, scarce.__name__, scarce)
    monkeypatch.setitem(dispatch.BACKENDS["slice_channels"], "scarce", dispatch.Backend("ops.scarce", ("cpu",)))
    tensors = [nn.Parameter(torch.arange(3.0 * n).view(n, 3)) for n in (4, 5, 6, 7)]
    pieces = [ops.Slice({1: torch.tensor([0, 2])}, torch.full((len(t),), 2.0)) for t in tensors]
    wanted = [2 * t.detach()[:, [0, 2]] if changes else t.detach().clone() for t in tensors]
    with contextlib.nullcontext() if changes else pytest.raises(torch.OutOfMemoryError):
        ops.slice_channels_(tensors, pieces, backend="scarce")
    assert all(torch.equal(t, w) for t, w in zip(tensors, wanted))


@needs_extension
@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("n_keep_a", 0, "keeps 1 to all"),
        ("n_keep_a", 5, "keeps 1 to all"),
        ("a", 2, "below the dim's size"),
        ("post", 0, "without elements"),
        ("source", 0, "without elements"),
    ],
)
def test_the_kernel_itself_refuses_a_table_that_does_not_fit(field: str, value: int, words: str) -> None:
    tensor = torch.arange(12.0).view(4, 3)
    keep = torch.tensor([0, 3])
    row = dict.fromkeys(cpu._cpu.SLICE_ENTRY.names, 0)
    row.update(source=tensor.data_ptr(), target=tensor.data_ptr(), element_size=4, pre=1, a=4, mid=1, b=1, post=3)
    row.update(keep_a=keep.data_ptr(), n_keep_a=2, n_keep_b=1)
    row[field] = value
    with pytest.raises(ValueError, match=words):
        cpu._cpu.slice_channels(cpu._rows([row], cpu._cpu.SLICE_ENTRY), 1)
    assert torch.equal(tensor, torch.arange(12.0).view(4, 3))


@needs_extension
@pytest.mark.parametrize("level", [0, 2])
def test_rows_of_more_than_two_to_the_31_elements(level: int) -> None:
    """2 GB that nobody touches but where it is looked at; instruction sets without compression gather by index."""
    n, where = 2**31 + 4096, [5, 2**31 - 1, 2**31, 2**31 + 70]
    tensor = torch.empty(n, dtype=torch.uint8)
    for i, at in enumerate(where):
        tensor[at] = i + 1
    if level == 2 and cpu.simd() == "AVX-512":
        pytest.skip("AVX-512 compresses by a bit per element: 256 MB of masks")
    cpu._cpu.limit_simd(level)
    try:
        ops.slice_channels_([tensor], [ops.Slice({0: torch.tensor(where)})], backend="cpu")
    finally:
        cpu._cpu.limit_simd(2)
    assert tensor.tolist() == [1, 2, 3, 4]


ALIASES = {
    "torch": torch.from_dlpack,
    "numpy's dlpack": np.from_dlpack,
    "numpy": lambda t: t.numpy(),
    "view": lambda t: t.view(-1),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("alias_of", ALIASES.values(), ids=ALIASES)
@pytest.mark.parametrize("size", [100, 1000])
def test_an_alias_by_dlpack_or_numpy_keeps_its_values(size: int, alias_of: Any, backend: str) -> None:
    tensor = torch.arange(float(size * size)).view(size, size)
    alias = alias_of(tensor)
    ops.slice_channels_([tensor], [ops.Slice({0: torch.arange(1, size, 2)})], backend=backend)
    assert tensor[0, 0] == size
    assert np.array_equal(np.asarray(alias).reshape(-1), np.arange(size * size))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("alias_of", [*ALIASES.values(), None], ids=[*ALIASES, "nobody"])
def test_former_memory_lives_as_long_as_somebody_sees_it(alias_of: Any, backend: str) -> None:
    memory = np.zeros((10, 10))
    freed = weakref.ref(memory)
    tensor = torch.from_numpy(memory)
    del memory
    alias = alias_of(tensor) if alias_of else None
    ops.slice_channels_([tensor], [ops.Slice({0: torch.arange(1, 10, 2)})], backend=backend)
    assert (freed() is None) == (alias is None)
