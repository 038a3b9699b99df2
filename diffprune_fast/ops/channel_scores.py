"""``channel_scores_``: from parameters and gradients to one score per unit."""

from __future__ import annotations

import importlib
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import dispatch

CRITERIA = ("abs", "signed", "square", "magnitude")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Sets of addresses that a bound call knows: gradients that the allocator hands out again come back at a few.
REMEMBERED = 8

_T = TypeVar("_T")


@dataclass(frozen=True)
class ScoreEntry:
    """Where one tensor's sums go.

    shape: the parameter seen as ``(outer, inner, trailing)``, row-major over its dims.
    row_units: ``(outer,)`` int32; outer index ``i``'s sum is added to ``scores[row_units[i]]``, -1 is nowhere.
    col_units: ``(inner,)`` int32, the same for the inner index. weight: factor of everything this tensor adds.
    """

    shape: tuple[int, int, int]
    row_units: Tensor | None = None
    col_units: Tensor | None = None
    weight: float = 1.0


class ScoreTable:
    """The entries of many tensors, checked once and reused in every call.

    entries: one per tensor. n_units: length of the score vector.
    Raises ValueError if an index table has the wrong length, dtype or a unit outside ``[-1, n_units)``.
    """

    def __init__(self, entries: Sequence[ScoreEntry], n_units: int) -> None:
        self.entries = tuple(entries)
        self.n_units = int(n_units)
        self._cache: dict[Hashable, Any] = {}
        for i, entry in enumerate(self.entries):
            _check_entry(i, entry, self.n_units)

    def __len__(self) -> int:
        return len(self.entries)

    def subset(self, indices: Sequence[int]) -> ScoreTable:
        """The table of some of the entries, over the same score vector (a bucket of parameters)."""
        table = object.__new__(ScoreTable)
        table.entries = tuple(self.entries[i] for i in indices)
        table.n_units = self.n_units
        table._cache = {}
        return table

    def bind(
        self,
        scores: Tensor,
        thetas: Sequence[Tensor],
        *,
        criterion: str = "abs",
        timestep_weights: Tensor | None = None,
        zero_grad: bool = False,
        backend: str = "auto",
    ) -> BoundScores:
        """:func:`channel_scores_` with everything but the gradients fixed, for many calls: ``bound(grads)``.

        Args: as of :func:`channel_scores_`; the parameters stay where they are now.

        Returns:
            A function of the gradients. In every call they have the same shapes, dtypes and memory order, which is
            checked where they lie at addresses that weren't seen lately; at known addresses nothing is.

        Example:
            >>> table = ScoreTable([ScoreEntry((2, 3, 1), row_units=torch.arange(2, dtype=torch.int32))], n_units=2)
            >>> scores, theta = torch.zeros(2), torch.tensor([[1.0, -1.0, 2.0], [3.0, 0.0, 0.0]])
            >>> bound = table.bind(scores, [theta])
            >>> for _ in range(3):
            ...     _ = bound([torch.ones(2, 3)])
            >>> scores
            tensor([12.,  9.])
        """
        options = {"criterion": criterion, "timestep_weights": timestep_weights, "zero_grad": zero_grad}
        return BoundScores(scores, thetas, self, options, backend)

    def cached(self, key: Hashable, build: Callable[[], _T]) -> _T:
        """``build()``, done once per ``key``: backends keep their device tables here."""
        if key not in self._cache:
            self._cache[key] = build()
        return self._cache[key]


class BoundScores:
    """What :meth:`ScoreTable.bind` returns."""

    def __init__(
        self, scores: Tensor, thetas: Sequence[Tensor], table: ScoreTable, options: Mapping[str, Any], backend: str
    ) -> None:
        # detached: a parameter that is given other data doesn't take these away
        self._fixed = scores, [theta.detach() for theta in thetas], table
        self._options, self._backend = dict(options), backend
        self._known: OrderedDict[tuple[int, ...], Callable[[Sequence[Tensor] | None], object]] = OrderedDict()

    def __call__(self, grads: Sequence[Tensor] | None) -> Tensor:
        """Add these gradients' scores; returns them all. Raises as :func:`channel_scores_`."""
        scores, thetas, table = self._fixed
        addresses = () if grads is None else tuple(map(Tensor.data_ptr, grads))
        call = self._known.get(addresses)
        if call is None:
            check(scores, thetas, grads, table, **self._options)
            run = dispatch.choose("channel_scores", scores.device, self._backend)
            bind = getattr(importlib.import_module(run.__module__), "bind", None)
            if bind is None:
                call = lambda grads: run(scores, thetas, grads, table, **self._options)  # noqa: E731
            else:
                call = bind(scores, thetas, grads, table, **self._options)
            self._known[addresses] = call
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(addresses)
        call(grads)
        return scores


def channel_scores_(
    scores: Tensor,
    thetas: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
    table: ScoreTable,
    *,
    criterion: str = "abs",
    timestep_weights: Tensor | None = None,
    zero_grad: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Add every channel's score to its unit's, reading each weight and gradient once.

    The same input gives the same bits, for any number of threads.

    Args:
        scores: ``(n_units,)`` float64 or float32, added into.
        thetas: per entry the parameter; contiguous or channels_last (other layouts are copied first).
        grads: per entry its gradient, same shape; or ``(T, *shape)`` with ``timestep_weights``, then
            ``g = sum_t timestep_weights[t] * grads[t]``. None only for ``"magnitude"``.
        table: where each entry's sums go.
        criterion: what is summed over a row and over a column: ``"abs"`` ``|theta * g|``, ``"signed"`` ``theta * g``,
            ``"square"`` ``(theta * g)**2``, ``"magnitude"`` ``theta**2``.
        timestep_weights: ``(T,)``, or None for gradients of the parameters' shapes.
        zero_grad: set the gradients to zero in the same pass.
        backend: ``"auto"``, or the name of one that :func:`backends` lists.

    Returns:
        ``scores``.

    Raises:
        ValueError, TypeError: the tensors don't fit the table; nothing is written.
        BackendError: the backend that was asked for can't serve.

    Example:
        >>> rows = torch.arange(2, dtype=torch.int32)
        >>> table = ScoreTable([ScoreEntry((2, 3, 1), row_units=rows)], n_units=2)
        >>> theta = torch.tensor([[1.0, -1.0, 2.0], [3.0, 0.0, 0.0]])
        >>> channel_scores_(torch.zeros(2), [theta], [torch.ones(2, 3)], table)
        tensor([4., 3.])

    Source: Fang et al., Structural Pruning for Diffusion Models (arXiv 2305.10924), eq. 7.
    """
    check(scores, thetas, grads, table, criterion, timestep_weights, zero_grad)
    run = dispatch.choose("channel_scores", scores.device, backend)
    run(
        scores,
        thetas,
        grads,
        table,
        criterion=criterion,
        timestep_weights=timestep_weights,
        zero_grad=zero_grad,
    )
    return scores


def check(
    scores: Tensor,
    thetas: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
    table: ScoreTable,
    criterion: str,
    timestep_weights: Tensor | None,
    zero_grad: bool,
) -> None:
    """Everything a kernel relies on. Raises ValueError or TypeError."""
    if criterion not in CRITERIA:
        raise ValueError(f"criterion {criterion!r} is unknown: use one of {', '.join(CRITERIA)}")
    if scores.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"scores must be float32 or float64, not {scores.dtype}")
    if scores.shape != (table.n_units,) or not scores.is_contiguous():
        raise ValueError(f"scores must be contiguous of shape ({table.n_units},), not {tuple(scores.shape)}")
    if len(thetas) != len(table.entries):
        raise ValueError(f"{len(thetas)} parameters for a table of {len(table.entries)} entries")
    steps: tuple[int, ...] = ()
    if timestep_weights is not None:
        if timestep_weights.dim() != 1 or timestep_weights.numel() == 0:
            raise ValueError(f"timestep_weights must be (T,) with T >= 1, not {tuple(timestep_weights.shape)}")
        steps = (timestep_weights.numel(),)
    device = scores.device
    for i, (theta, entry) in enumerate(zip(thetas, table.entries)):
        if theta.dtype not in DTYPES:
            raise TypeError(f"parameter {i} is {theta.dtype}: only {', '.join(map(str, DTYPES))} can be scored")
        if theta.device != device:
            raise ValueError(f"parameter {i} is on {theta.device}, scores are on {device}")
        _check_collapses(i, tuple(theta.shape), entry.shape)
    if grads is None:
        if criterion != "magnitude":
            raise ValueError(f"criterion {criterion!r} needs gradients (only 'magnitude' takes grads=None)")
        return
    if len(grads) != len(thetas):
        raise ValueError(f"{len(grads)} gradients for {len(thetas)} parameters")
    for i, (theta, grad) in enumerate(zip(thetas, grads)):
        if grad.dtype != theta.dtype or grad.device != device:
            raise ValueError(
                f"gradient {i} is {grad.dtype} on {grad.device}, its parameter {theta.dtype} on {theta.device}"
            )
        if grad.shape != steps + theta.shape:
            raise ValueError(f"gradient {i} has shape {tuple(grad.shape)}, expected {steps + tuple(theta.shape)}")
    if zero_grad:
        _check_writable(scores, thetas, grads)


def _check_entry(i: int, entry: ScoreEntry, n_units: int) -> None:
    if len(entry.shape) != 3 or min(entry.shape) < 1:
        raise ValueError(f"entry {i}: shape {entry.shape} is not (outer, inner, trailing) of positive sizes")
    if not math.isfinite(entry.weight):
        raise ValueError(f"entry {i}: weight {entry.weight} is not finite")
    for name, units, size in (("row_units", entry.row_units, 0), ("col_units", entry.col_units, 1)):
        if units is None:
            continue
        if units.dtype != torch.int32 or units.shape != (entry.shape[size],):
            raise ValueError(
                f"entry {i}: {name} must be int32 of shape ({entry.shape[size]},), "
                f"not {units.dtype} of shape {tuple(units.shape)}"
            )
        low, high = int(units.min()), int(units.max())
        if low < -1 or high >= n_units:
            raise ValueError(f"entry {i}: {name} holds {low if low < -1 else high}, outside [-1, {n_units})")


def _check_collapses(i: int, shape: tuple[int, ...], collapsed: tuple[int, int, int]) -> None:
    """``collapsed`` must be ``shape`` with neighbouring dims merged (sizes of 1 may come and go)."""
    if shape[:2] == collapsed[:2] and math.prod(shape) == math.prod(collapsed):
        return
    edges, size = {1}, 1
    for extent in reversed(shape):
        size *= extent
        edges.add(size)
    outer, inner, trailing = collapsed
    if size != outer * inner * trailing or trailing not in edges or inner * trailing not in edges:
        raise ValueError(f"parameter {i} of shape {shape} can't be seen as {collapsed}")


def _check_writable(scores: Tensor, thetas: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """zero_grad writes: no gradient may share memory with anything else that is read or written."""
    if scores.device.type == "meta":
        return
    spans = []
    for name, tensors in (("scores", [scores]), ("parameter", thetas), ("gradient", grads)):
        for i, tensor in enumerate(tensors):
            if name == "gradient" and any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape)):
                raise ValueError(f"gradient {i} is expanded (stride 0): it can't be zeroed in place, clone() it first")
            begin = tensor.data_ptr()
            extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
            spans.append((begin, begin + extent * tensor.element_size(), name, i))
    spans.sort()
    # parameters may share memory (tied ones): only what is written counts
    end, owner = -1, ("", 0)
    written_end, written = -1, ("", 0)
    for begin, stop, name, i in spans:
        if begin < written_end or (name != "parameter" and begin < end):
            first = written if begin < written_end else owner
            raise ValueError(f"{name} {i} shares memory with {first[0]} {first[1]}: zero_grad would write into both")
        if stop > end:
            end, owner = stop, (name, i)
        if name != "parameter" and stop > written_end:
            written_end, written = stop, (name, i)
