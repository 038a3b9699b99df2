"""Parameters that pruning has cut and that still have their old bytes: one launch slices them all."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ... import ops
from ...ops.slice_channels import is_dense

Keeps = dict[int, np.ndarray]


class Pending:
    """What waits to be sliced, and what was kept of every parameter that was.

    A cut parameter becomes a new one, as Torch-Pruning makes a new one, which borrows the old one's memory until
    :meth:`flush`. Whoever holds the old one still finds it whole.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[nn.Parameter, Keeps]] = {}
        self._kept: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def cut(self, weight: Tensor, keep: np.ndarray, dim: int) -> nn.Parameter | None:
        """The parameter with only these indices of a dim, sliced at the next :meth:`flush`; None if that can't be.

        keep: ``(n,)`` indices of what ``weight`` has left.
        """
        dim %= max(weight.dim(), 1)
        waiting = self._waiting.get(id(weight))
        before = waiting[1].get(dim) if waiting is not None else None
        size = weight.shape[dim] if before is None else len(before)
        if not _sliceable(weight) or len(keep) == 0 or keep[0] < 0 or keep[-1] >= size or (np.diff(keep) < 1).any():
            return None
        if waiting is not None:
            waiting[1][dim] = keep if before is None else before[keep]
            return waiting[0]
        new = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
        if weight.grad is not None:
            new.grad = weight.grad.detach()
        self._waiting[id(new)] = new, {dim: keep}
        self._kept[new] = dict(self._kept.get(weight, {}))
        return new

    def note(self, weight: Tensor, new: Tensor, keep: np.ndarray, dim: int) -> None:
        """Remember what somebody else's slicing kept."""
        self._kept[new] = composed(self._kept.get(weight, {}), {dim % max(weight.dim(), 1): keep})

    def flush(self) -> None:
        """Slice what waits, in one launch; tensors that share memory one after the other."""
        waiting, self._waiting = list(self._waiting.values()), {}
        tables: dict[int, Tensor] = {}  # of one index table for all tensors that it serves
        for new, keeps in waiting:
            self._kept[new] = composed(self._kept[new], keeps)
        while waiting:
            seen: set[int] = set()
            tensors: list[Tensor] = []
            slices: list[ops.Slice] = []
            later = []
            for new, keeps in waiting:
                both: list[Tensor] = [t for t in (new, new.grad) if t is not None]
                if new.device.type != "meta" and any(t.data_ptr() in seen for t in both):
                    later.append((new, keeps))
                    continue
                seen.update(t.data_ptr() for t in both)
                piece = ops.Slice({d: tables.setdefault(id(k), torch.from_numpy(k)) for d, k in keeps.items()})
                tensors += both
                slices += [piece] * len(both)
            ops.slice_channels_(tensors, slices)
            waiting = later

    def kept(self, weight: Tensor) -> Keeps:
        """Dim to the indices of the parameter that was there first; dims that lost nothing are missing."""
        return self._kept.get(weight, {})


def composed(first: Keeps, then: Keeps) -> Keeps:
    """What two slicings leave of the first one's input."""
    return {**first, **{dim: first[dim][keep] if dim in first else keep for dim, keep in then.items()}}


def as_indices(keep: Any) -> np.ndarray:
    return np.asarray(keep.cpu() if isinstance(keep, Tensor) else keep, np.int64).reshape(-1)


def _sliceable(weight: Tensor) -> bool:
    return weight.dim() > 0 and all(_owned(t) for t in (weight, weight.grad) if t is not None)


def _owned(t: Tensor) -> bool:
    """Whether the kernels can take the tensor: plain, dense, and all of its storage."""
    if type(t) not in (Tensor, nn.Parameter) or t.layout != torch.strided or t.is_conj() or t.is_neg():
        return False
    if t.device.type == "meta":
        return True
    return t.untyped_storage().nbytes() == t.numel() * t.element_size() and is_dense(t)
