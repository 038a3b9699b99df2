"""What every channel of many parameters sums up to: one pass over weights and gradients, kept until they change."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops.channel_scores import DTYPES, ScoreEntry, ScoreTable, channel_scores_


class MissingGradient(ValueError):
    """A parameter has no gradient to multiply its weights with."""


@dataclass(frozen=True)
class Sum:
    """The sums of one parameter.

    weight: the parameter that was read. stamp: what shows that it, or its gradient, is another one by now. of_dim: the
    sums over everything but dim 0 and, where there is one, over everything but dim 1; float64.
    """

    weight: weakref.ref[Tensor]
    stamp: tuple[int, ...]
    of_dim: tuple[Tensor, ...]


class ChannelSums:
    """Sums over the channels of parameters, by ``ops.channel_scores_``.

    element: what is summed, one of ``ops.CRITERIA``; with ``p`` other than 2, ``"magnitude"`` sums ``|theta|**p``.
    """

    def __init__(self, element: str, p: float = 2, backend: str = "auto") -> None:
        self.element, self.p, self.backend = element, p, backend
        self._of: dict[int, Sum] = {}
        self._tables: dict[tuple[tuple[int, ...], ...], ScoreTable] = {}

    def clear(self) -> None:
        self._of.clear()

    def holds(self, weight: Tensor, *, same_values: bool = True) -> bool:
        """Whether there are sums of this very parameter; with ``same_values``, of the values that it has now."""
        found = self._of.get(id(weight))
        if found is None or found.weight() is not weight or _sizes(weight) != tuple(map(len, found.of_dim)):
            return False
        return not same_values or found.stamp == self._stamp(weight)

    def of(self, weight: Tensor, dim: int) -> Tensor:
        """``(size of dim,)`` float64. Raises MissingGradient where there was nothing to sum."""
        found = self._of.get(id(weight))
        if found is None:
            raise MissingGradient(f"a parameter of shape {tuple(weight.shape)} has no gradient: call backward() first")
        return found.of_dim[dim]

    def add(self, weights: Sequence[Tensor], *, to_last: bool = False) -> None:
        """Read every parameter (and its gradient) once; ``to_last`` adds to the sums that are there."""
        needs_grad = self.element != "magnitude"
        usable = [w for w in weights if w.dtype in DTYPES and w.dim() and w.numel()]
        usable = [w for w in usable if not needs_grad or (w.grad is not None and w.grad.dtype == w.dtype)]
        for device in dict.fromkeys(w.device for w in usable):
            mine = [w for w in usable if w.device == device]
            for weight, sums in zip(mine, self._read(mine, device)):
                if to_last and self.holds(weight, same_values=False):
                    sums = tuple(a + b for a, b in zip(self._of[id(weight)].of_dim, sums))
                self._of[id(weight)] = Sum(weakref.ref(weight), self._stamp(weight), sums)

    def _read(self, weights: Sequence[Tensor], device: torch.device) -> list[tuple[Tensor, ...]]:
        if self.element == "magnitude" and self.p != 2:
            return [self._powers(w.detach()) for w in weights]
        table = self._table(tuple(tuple(w.shape) for w in weights))
        scores = torch.zeros(table.n_units, dtype=torch.float64, device=device)
        grads = None if self.element == "magnitude" else [w.grad.detach() for w in weights if w.grad is not None]
        thetas = [w.detach() for w in weights]
        channel_scores_(scores, thetas, grads, table, criterion=self.element, backend=self.backend)
        if self.element == "signed":
            scores = scores.abs_()
        pieces = iter(scores.split([n for w in weights for n in _sizes(w)]))
        return [tuple(next(pieces) for _ in _sizes(w)) for w in weights]

    def _powers(self, theta: Tensor) -> tuple[Tensor, ...]:
        powers = theta.abs().pow(self.p).flatten(2) if theta.dim() > 2 else theta.abs().pow(self.p)[..., None]
        return tuple(
            powers.sum([d for d in range(powers.dim()) if d != kept]).double() for kept in range(powers.dim() - 1)
        )

    def _table(self, shapes: tuple[tuple[int, ...], ...]) -> ScoreTable:
        if shapes not in self._tables:
            self._tables.clear()
            entries, start = [], 0
            for shape in shapes:
                ranges: list[Tensor | None] = [None, None]
                for dim, n in enumerate(shape[:2]):
                    ranges[dim] = torch.arange(start, start + n, dtype=torch.int32)
                    start += n
                inner = shape[1] if len(shape) > 1 else 1
                trailing = torch.Size(shape[2:]).numel()
                entries.append(ScoreEntry((shape[0], inner, trailing), ranges[0], ranges[1]))
            self._tables[shapes] = ScoreTable(entries, start)
        return self._tables[shapes]

    def _stamp(self, weight: Tensor) -> tuple[int, ...]:
        grad = weight.grad if self.element != "magnitude" else None
        return tuple(n for t in (weight, grad) if t is not None for n in (t._version, t.data_ptr()))


def _sizes(weight: Tensor) -> tuple[int, ...]:
    return tuple(weight.shape[:2])
