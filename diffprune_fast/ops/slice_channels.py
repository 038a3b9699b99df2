"""``slice_channels_``: tensors become their kept channels."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat

import torch
from torch import Tensor

from . import dispatch

Step = Callable[[], object]
"""A call without arguments, prepared so that nothing which could be known beforehand makes it fail."""


@dataclass(frozen=True)
class Slice:
    """What stays of one tensor.

    keep: dim to sorted, unique int64 indices that stay; dims that aren't named stay whole.
    scale: ``(kept along dim 0,)`` factor for the rows that stay.
    """

    keep: Mapping[int, Tensor]
    scale: Tensor | None = None


def slice_channels_(tensors: Sequence[Tensor], slices: Sequence[Slice], *, backend: str = "auto") -> None:
    """Make every tensor its kept slice: the same Tensor object with a new shape and smaller storage.

    Everything is checked, and all memory is taken, before the first tensor changes. On the CPU tensors are compacted
    within their own memory; only those whose memory somebody else sees too (an alias, a file, a NumPy or DLPack array),
    and those under 16 KB, get new memory. The CUDA kernels need at most the largest tensor's bytes on top of what is
    there, the reference those of all that is kept.

    Args:
        tensors: parameters, gradients or optimiser state of any dtype; contiguous or channels_last, which is kept, as
            are ``requires_grad`` and hooks.
        slices: one per tensor.
        backend: ``"auto"``, or the name of one that :func:`backends` lists.

    Returns:
        None: the tensors themselves are changed.

    Raises:
        ValueError, TypeError: unsorted, repeated, empty or out-of-range indices, views of a larger storage, tensors
            that share memory.
        BackendError: the backend that was asked for can't serve.

    Example:
        >>> weight = torch.arange(6.0).view(3, 2)
        >>> slice_channels_([weight], [Slice({0: torch.tensor([0, 2])})])
        >>> weight
        tensor([[0., 1.],
                [4., 5.]])
    """
    for step in slice_steps(tensors, slices, backend=backend):
        step()


def slice_steps(
    tensors: Sequence[Tensor], slices: Sequence[Slice], *, backend: str = "auto", names: Sequence[str] | None = None
) -> list[Step]:
    """What :func:`slice_channels_` would do, ready to be done: everything is checked, all memory is there.

    names: what messages call the tensors. Returns calls without arguments, to be made once and in this order; none of
    them fails for anything that could be known beforehand. Raises as :func:`slice_channels_`.
    """
    slices = _own_tables(slices)
    check(tensors, slices, names)
    steps: list[Step] = _former_memory_kept(tensors, slices)
    for device in dict.fromkeys(t.device for t in tensors):
        mine = [i for i, t in enumerate(tensors) if t.device == device]
        module = dispatch.choose_module("slice_channels", device, backend)
        some = [tensors[i] for i in mine], [slices[i] for i in mine]
        if hasattr(module, "slice_steps"):
            steps += module.slice_steps(*some)
        else:
            steps += [partial(_to_the_end, module.slice_channels_, *some)]
            steps += [partial(_leave_old_graph, t) for t in some[0]]
    return steps


def known_references(tensors: Sequence[Tensor]) -> dict[int, int]:
    """By id, how many references to each tensor there are in C++ that are accounted for: Python's, and that of the
    parameter whose gradient it is. A DLPack capsule is another one."""
    gradients = {id(t.grad) for t in tensors if t.is_leaf and t.grad is not None}
    return {id(t): 2 if id(t) in gradients else 1 for t in tensors}


def _former_memory_kept(tensors: Sequence[Tensor], slices: Sequence[Slice]) -> list[Step]:
    """Where somebody in C++ has a tensor itself, as a DLPack capsule does, its former memory lives as long as it.

    (A graph refers to tensors that require a gradient, but those DLPack refuses.)
    """
    known = known_references(tensors)
    return [
        partial(setattr, t, "_former_memory", t.untyped_storage())
        for t, piece in zip(tensors, slices)
        if not t.requires_grad
        and t._use_count() > known[id(t)]  # type: ignore[attr-defined]
        and (piece.scale is not None or sliced_shape(t, piece) != tuple(t.shape))
    ]


def _to_the_end(run: Callable[..., None], tensors: Sequence[Tensor], slices: Sequence[Slice]) -> None:
    """For a backend that takes its memory as it goes: where that runs out half-way, the others follow one by one, over
    the CPU if need be. Raises what the backend raises before the first tensor has changed."""
    places = [t.data_ptr() for t in tensors]
    try:
        return run(tensors, slices)
    except Exception:
        left = [i for i, t in enumerate(tensors) if t.data_ptr() == places[i]]
        if len(left) == len(tensors):
            raise
    for i in left:
        t, piece = tensors[i], slices[i]
        try:
            run([t], [piece])
        except Exception:
            sliced = dispatch.choose_module("slice_channels", t.device, "reference").slice_channels(t.cpu(), piece)
            t.data = torch.empty(0, dtype=t.dtype, device=t.device)  # its memory is what the slice needs
            t.data = sliced.to(t.device)


def set_data(tensor: Tensor, data: Tensor) -> list[Step]:
    """The calls that give a tensor other data, of any shape, and its next forward a new gradient accumulator.

    A graph that is still held (a loss in scope, DistributedDataParallel) keeps the accumulator with the old shape
    alive, and autograd takes the one that there is, whatever became of the sizes. Only data of another type makes
    PyTorch let go of it (``VariableHooks::set_data``), so that comes first.
    """
    steps: list[Step] = [partial(setattr, tensor, "data", data)]
    if tensor.requires_grad and tensor.shape != data.shape:
        steps.insert(0, partial(setattr, tensor, "data", _of_another_type(tensor)))
    return steps


def _of_another_type(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.float32 if tensor.dtype == torch.float16 else torch.float16, device=tensor.device)


def _leave_old_graph(tensor: Tensor) -> None:
    if tensor.requires_grad:
        both = _of_another_type(tensor), tensor.data
        deque(map(setattr, repeat(tensor), repeat("data"), both), maxlen=0)  # one call: never only the first of them


def _own_tables(slices: Sequence[Slice]) -> list[Slice]:
    """The slices with index tables and factors that nobody else holds: what was checked stays as it is."""
    copies: dict[int, Tensor] = {}

    def copied(t: Tensor) -> Tensor:
        if id(t) not in copies:
            copies[id(t)] = t.detach().clone() if type(t) is Tensor else t
        return copies[id(t)]

    return [
        Slice({d: copied(k) for d, k in s.keep.items()}, None if s.scale is None else copied(s.scale)) for s in slices
    ]


def check(tensors: Sequence[Tensor], slices: Sequence[Slice], names: Sequence[str] | None = None) -> None:
    """Everything a kernel relies on. Raises ValueError or TypeError."""
    if len(tensors) != len(slices):
        raise ValueError(f"{len(tensors)} tensors for {len(slices)} slices")
    checked: dict[int, int] = {}
    for i, (tensor, piece) in enumerate(zip(tensors, slices)):
        who = names[i] if names is not None else f"tensor {i}"
        check_kind(who, tensor)
        _check_keep(who, tensor, piece, checked)
        _check_scale(who, tensor, piece)
        _check_owned(who, tensor)
    _check_disjoint(tensors, names or [f"tensor {i}" for i in range(len(tensors))])


def sliced_shape(tensor: Tensor, piece: Slice) -> tuple[int, ...]:
    """The shape that ``tensor`` has once it is sliced."""
    sizes = list(tensor.shape)
    for dim, keep in piece.keep.items():
        sizes[dim] = keep.shape[0]
    return tuple(sizes)


def _check_keep(who: str, tensor: Tensor, piece: Slice, checked: dict[int, int]) -> None:
    """``checked`` remembers index tables by identity: one table usually serves many tensors."""
    shape = tensor.shape
    for dim, keep in piece.keep.items():
        if not 0 <= dim < len(shape):
            raise ValueError(f"{who} of shape {tuple(shape)} has no dim {dim}")
        if id(keep) not in checked:
            if keep.dtype != torch.int64 or keep.dim() != 1:
                raise TypeError(f"{who}, dim {dim}: kept indices must be 1-D int64, not {keep.dim()}-D {keep.dtype}")
            if keep.numel() == 0:
                raise ValueError(f"{who}, dim {dim}: no index is kept; at least one channel must stay")
            if not _has_values(keep):
                raise TypeError(f"{who}, dim {dim}: kept indices on meta have no values: give a CPU tensor")
            if int(keep[0]) < 0 or not bool((keep[1:] > keep[:-1]).all()):
                raise ValueError(f"{who}, dim {dim}: kept indices must be sorted, unique and not negative")
            checked[id(keep)] = int(keep[-1])
        last = checked[id(keep)]
        if last >= shape[dim] or keep.shape[0] > shape[dim]:
            raise ValueError(f"{who}, dim {dim}: index {last} is out of range for size {shape[dim]}")


def _has_values(tensor: Tensor) -> bool:
    return tensor.device.type != "meta" and _is_plain(tensor)


def _is_plain(tensor: Tensor) -> bool:
    """Whether the tensor's memory is what it says: no FakeTensor, DTensor or other class that stands for something."""
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


def check_kind(who: str, tensor: Tensor) -> None:
    """The tensor's elements lie in memory, as a plain tensor's do. Raises TypeError."""
    if not _is_plain(tensor):
        raise TypeError(
            f"{who} is a {type(tensor).__name__}, whose memory isn't that of a plain tensor: slice the model before "
            "it is distributed, quantized or faked"
        )
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise TypeError(f"{who} is {tensor.layout}, {tensor.dtype}: only dense tensors can be sliced")


def _check_scale(who: str, tensor: Tensor, piece: Slice) -> None:
    if piece.scale is None:
        return
    if tensor.dim() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
        raise TypeError(f"{who} is {tensor.dim()}-D {tensor.dtype}: only floating-point rows can be scaled")
    rows = piece.keep[0].shape[0] if 0 in piece.keep else tensor.shape[0]
    if not _has_values(piece.scale):
        raise TypeError(f"{who}: a scale on meta has no values")
    if tuple(piece.scale.shape) != (rows,) or not piece.scale.is_floating_point():
        raise ValueError(
            f"{who}: scale must be floating point of shape ({rows},), "
            f"not {piece.scale.dtype} of shape {tuple(piece.scale.shape)}"
        )


def _check_owned(who: str, tensor: Tensor) -> None:
    if not tensor.is_leaf:
        raise ValueError(f"{who} is the result of a differentiable operation: only leaves can be sliced in place")
    if tensor._is_view() and tensor.grad_fn is not None:
        raise ValueError(f"{who} is a view that autograd tracks")
    if tensor.device.type == "meta":
        return
    wanted, held = tensor.nbytes, tensor.untyped_storage().nbytes()
    dense = is_dense(tensor)
    if held == wanted and dense and tensor.storage_offset() == 0:
        return
    if dense and held < wanted:
        raise ValueError(
            f"{who} of shape {tuple(tensor.shape)} has no memory: its storage was released, as FSDP and offloading "
            "do; bring the weights back first"
        )
    if tensor.storage_offset() != 0 or held > wanted:
        raise ValueError(
            f"{who} of shape {tuple(tensor.shape)} is a view of a larger storage, whose memory can't be given "
            "back: clone() it first"
        )
    if not dense:
        raise ValueError(
            f"{who} of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not dense: make it contiguous first"
        )


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor's elements fill its memory without gaps or overlap, in any order of dims."""
    if tensor.is_contiguous() or tensor.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _check_disjoint(tensors: Sequence[Tensor], names: Sequence[str]) -> None:
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + t.nbytes, i)
        for i, t in enumerate(tensors)
        if t.device.type != "meta" and t.numel()
    )
    for (_, end, i), (begin, _, j) in itertools.pairwise(spans):
        if begin < end:
            first, second = names[min(i, j)], names[max(i, j)]
            raise ValueError(f"{first} and {second} share memory: name a tied parameter only once")
    seen: dict[int, int] = {}
    for i, tensor in enumerate(tensors):
        if seen.setdefault(id(tensor), i) != i:
            raise ValueError(f"{names[seen[id(tensor)]]} and {names[i]} are the same: name a tied parameter only once")
