"""``slice_channels_``: tensors become their kept channels."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import dispatch


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

    At most the largest tensor's bytes are needed on top of what is there, because every tensor's old memory is given
    back before the next one's new memory is taken. Everything is checked before the first tensor changes.

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
    check(tensors, slices)
    for device in dict.fromkeys(t.device for t in tensors):
        mine = [i for i, t in enumerate(tensors) if t.device == device]
        run = dispatch.choose("slice_channels", device, backend)
        run([tensors[i] for i in mine], [slices[i] for i in mine])
        for i in mine:
            leave_old_graph(tensors[i])


def leave_old_graph(tensor: Tensor) -> None:
    """Let the next forward make a new gradient accumulator, of the tensor's present shape.

    A graph that is still held (a loss in scope, DistributedDataParallel) keeps the accumulator of the old shape alive,
    and autograd takes the one that there is, whatever became of the sizes. Only data of another type makes PyTorch let
    go of it (``VariableHooks::set_data``, the same from 1.5 to 2.13), so the data goes away and comes back.
    """
    if tensor.requires_grad:
        data = tensor.data
        other = torch.float32 if tensor.dtype == torch.float16 else torch.float16
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
        tensor.data = data


def check(tensors: Sequence[Tensor], slices: Sequence[Slice]) -> None:
    """Everything a kernel relies on. Raises ValueError or TypeError."""
    if len(tensors) != len(slices):
        raise ValueError(f"{len(tensors)} tensors for {len(slices)} slices")
    checked: dict[int, int] = {}
    for i, (tensor, piece) in enumerate(zip(tensors, slices)):
        _check_keep(i, tensor, piece, checked)
        _check_scale(i, tensor, piece)
        _check_owned(i, tensor)
    _check_disjoint(tensors)


def sliced_shape(tensor: Tensor, piece: Slice) -> tuple[int, ...]:
    """The shape that ``tensor`` has once it is sliced."""
    return tuple(piece.keep[d].shape[0] if d in piece.keep else n for d, n in enumerate(tensor.shape))


def _check_keep(i: int, tensor: Tensor, piece: Slice, checked: dict[int, int]) -> None:
    """``checked`` remembers index tables by identity: one table usually serves many tensors."""
    shape = tensor.shape
    for dim, keep in piece.keep.items():
        if not 0 <= dim < len(shape):
            raise ValueError(f"tensor {i} of shape {tuple(shape)} has no dim {dim}")
        if id(keep) not in checked:
            if keep.dtype != torch.int64 or keep.dim() != 1:
                raise TypeError(
                    f"tensor {i}, dim {dim}: kept indices must be 1-D int64, not {keep.dim()}-D {keep.dtype}"
                )
            if keep.numel() == 0:
                raise ValueError(f"tensor {i}, dim {dim}: no index is kept; at least one channel must stay")
            if keep.device.type != "meta":
                if int(keep[0]) < 0 or not bool((keep[1:] > keep[:-1]).all()):
                    raise ValueError(f"tensor {i}, dim {dim}: kept indices must be sorted, unique and not negative")
                checked[id(keep)] = int(keep[-1])
        last = checked.get(id(keep), -1)
        if last >= shape[dim] or keep.shape[0] > shape[dim]:
            raise ValueError(f"tensor {i}, dim {dim}: index {last} is out of range for size {shape[dim]}")


def _check_scale(i: int, tensor: Tensor, piece: Slice) -> None:
    if piece.scale is None:
        return
    if tensor.dim() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
        raise TypeError(f"tensor {i} is {tensor.dim()}-D {tensor.dtype}: only floating-point rows can be scaled")
    rows = piece.keep[0].shape[0] if 0 in piece.keep else tensor.shape[0]
    if tuple(piece.scale.shape) != (rows,) or not piece.scale.is_floating_point():
        raise ValueError(
            f"tensor {i}: scale must be floating point of shape ({rows},), "
            f"not {piece.scale.dtype} of shape {tuple(piece.scale.shape)}"
        )


def _check_owned(i: int, tensor: Tensor) -> None:
    if not tensor.is_leaf:
        raise ValueError(f"tensor {i} is the result of a differentiable operation: only leaves can be sliced in place")
    if tensor._is_view() and tensor.grad_fn is not None:
        raise ValueError(f"tensor {i} is a view that autograd tracks")
    if tensor.device.type == "meta":
        return
    wanted = tensor.numel() * tensor.element_size()
    if tensor.storage_offset() != 0 or tensor.untyped_storage().nbytes() > wanted:
        raise ValueError(
            f"tensor {i} of shape {tuple(tensor.shape)} is a view of a larger storage, whose memory can't be given "
            "back: clone() it first"
        )
    if not is_dense(tensor):
        raise ValueError(
            f"tensor {i} of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not dense: "
            "make it contiguous first"
        )


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor's elements fill its memory without gaps or overlap, in any order of dims."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _check_disjoint(tensors: Sequence[Tensor]) -> None:
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), i)
        for i, t in enumerate(tensors)
        if t.device.type != "meta" and t.numel()
    )
    for (_, end, i), (begin, _, j) in itertools.pairwise(spans):
        if begin < end:
            raise ValueError(f"tensors {min(i, j)} and {max(i, j)} share memory: name a tied parameter only once")
    seen: dict[int, int] = {}
    for i, tensor in enumerate(tensors):
        if seen.setdefault(id(tensor), i) != i:
            raise ValueError(f"tensors {seen[id(tensor)]} and {i} are the same: name a tied parameter only once")
