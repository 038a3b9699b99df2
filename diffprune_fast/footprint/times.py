"""Seconds of a forward as a function of how many units every group keeps, from operations that were measured."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from ..architectures.inputs import Call, ExampleInputs, calls_of
from ..plan.lattice import Lattice
from ..plan.plan import Plan
from ..tracing.meta import device_of
from .cache import Measured, default_folder
from .clock import Clock, DeviceClock
from .curves import Curve, Curves, measure_curve
from .levels import TimesOfLevels
from .recording import record
from .replay import kind_of, sized
from .widths import Widths


@dataclass(frozen=True)
class Term:
    """Operations that always take the same time: their curve, the two axes as numbers of widths, and how many."""

    curve: int
    axes: tuple[tuple[int, ...], tuple[int, ...]]
    n: int


class Times:
    """What a forward of the model takes on a device, in seconds, with any numbers of units kept.

    Call it with kept counts, ``(n_groups,)`` or ``(n, n_groups)``. device: in words. dense: seconds of the dense model,
    as measured. fixed: seconds of it that follow no width: what surrounds operations, and those on no channels.
    """

    kind = "latency"

    def __init__(
        self, widths: Widths, terms: Sequence[Term], curves: Sequence[Curve], clock: Clock, calls: Sequence[Call]
    ) -> None:
        self.widths, self.terms, self.clock, self.calls = widths, tuple(terms), clock, calls
        self.device = clock.name
        self.fixed, self.factor = 0.0, 1.0
        self.curves = Curves(curves)
        self._curve = np.array([t.curve for t in terms], np.int64)
        self._n = np.array([t.n for t in terms], float)
        self._axes = [_padded([t.axes[i] for t in terms]) for i in range(2)]
        whole = widths.at(np.zeros(widths.per_group.shape[1]))
        self._whole = np.append(whole, 1.0)

    def calibrated(self, whole: np.ndarray, dense: float) -> Times:
        """The same, so that the dense model, of counts ``whole``, takes ``dense`` seconds.

        What it takes longer than its operations alone surrounds them and stays; where they alone took longer (the
        machine was busier) they all count less.
        """
        self._whole, self._dense_counts = np.append(self.widths.at(whole), 1.0), whole
        alone = float(self._operations(whole[None])[0])
        self.factor = min(1.0, dense / max(alone, 1e-30))
        self.fixed = max(0.0, dense - alone)
        self.dense = dense
        return self

    def through(self, counts: np.ndarray, share: float) -> Times:
        """The same, so that a model of these counts takes this share of the dense model's time, as measured."""
        full, thin = self._operations(np.stack([self._dense_counts, counts]))
        if thin < full and share < 1:
            self.factor = float(min(self.dense * (1 - share) / (full - thin), self.dense / full))
            self.fixed = float(self.dense - self.factor * full)
        return self

    def words(self, seconds: float) -> str:
        return f"{seconds * 1e3:.4g} ms"

    def limits(self) -> str:
        """What keeps a forward from taking less, in words."""
        return (
            f"{self.words(self.fixed)} of {self.words(self.dense)} on {self.device} surround the operations and follow "
            "no width (a larger batch in example_inputs, or torch.compile, makes less of them)"
        )

    def measured(self, models: Sequence[nn.Module]) -> list[float]:
        """Seconds of a forward of each; their ratios are what counts."""
        return self.clock.models(models, self.calls)

    def __call__(self, counts: np.ndarray) -> Any:
        rows = np.atleast_2d(counts)
        found = self.fixed + self.factor * self._operations(rows)
        return found if counts.ndim > 1 else found[0]

    def in_levels(self, lattice: Lattice) -> TimesOfLevels:
        """The same by kept levels, for the allocation."""
        factor = self.factor * self._n
        return TimesOfLevels(self.widths, lattice, self._axes, self._curve, factor, self.curves, self._whole)

    def _operations(self, rows: np.ndarray) -> np.ndarray:
        row, term = np.indices((len(rows), len(self.terms))).reshape(2, -1)
        return np.bincount(row, weights=self._terms(self._shares(rows), row, term), minlength=len(rows))

    def _shares(self, rows: np.ndarray) -> np.ndarray:
        """``(n, n_widths + 1)``: the share of every width that is left, 1 at the end."""
        sizes = self.widths.at(rows)
        return np.concatenate([sizes / self._whole[:-1], np.ones((len(rows), 1))], axis=1)

    def _terms(self, shares: np.ndarray, row: np.ndarray, term: np.ndarray) -> np.ndarray:
        x, y = (shares[row[:, None], axis[term]].prod(axis=1) for axis in self._axes)
        return self._n[term] * self.curves.at(self._curve[term], x, y)


def _padded(axes: Sequence[tuple[int, ...]]) -> np.ndarray:
    """``(n_terms, most)`` numbers of widths, filled up with the last, which is always whole."""
    found = np.full((len(axes), max((len(a) for a in axes), default=1) or 1), -1, np.int64)
    for row, axis in zip(found, axes):
        row[: len(axis)] = axis
    return found


def measure_times(
    model: nn.Module,
    plan: Plan,
    example_inputs: ExampleInputs | None = None,
    *,
    round_to: int | None = 8,
    cache: str | os.PathLike[str] | None = "default",
    clock: Clock | None = None,
) -> Times:
    """Measure what the model's operations take on its device, at widths that suit it, for ``latency=``.

    Every operation that works on channels is called by itself with the shapes that it has in one forward of the example
    inputs, at their batch size, in the model's dtype and memory format: convolutions and linear layers at two dozen
    widths of either side, others at five. The dense model is timed as a whole; what it takes longer than its operations
    surrounds them and is counted as fixed. In eager mode, with the number of threads that there is now.

    Args:
        model: on the device that counts. It is called, and left as it was.
        plan: of the model.
        example_inputs: as for :func:`trace`; give the batch size that you will use.
        round_to: widths that are measured are multiples of so many channels.
        cache: a folder where seconds are kept by device, threads, version of PyTorch, dtype and shapes; ``"default"``
            is ``~/.cache/diffprune_fast``, None keeps nothing.
        clock: what measures, if not the device's own time.

    Returns:
        Seconds as a function of kept counts, for ``select(..., latency=0.6, costs={"latency": times})``.

    Raises:
        TraceError, ValueError: as :func:`trace`.

    Example:
        >>> import torch
        >>> from diffprune_fast import trace
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> plan = trace(model, (torch.zeros(8, 4),))
        >>> times = measure_times(model, plan, (torch.zeros(8, 4),), cache=None)
        >>> round(float(times(plan.counts())) / times.dense, 6)
        1.0
    """
    found = record(model, plan, example_inputs)
    clock = clock or DeviceClock(device_of(model))
    measured = Measured(clock, default_folder() if cache == "default" else cache)
    whole = found.widths.at(plan.counts())
    kinds: dict[str, int] = {}
    curves: list[Curve] = []
    terms: dict[tuple[int, tuple[tuple[int, ...], tuple[int, ...]]], int] = {}
    try:
        for operation in found.operations:
            kind, widths = kind_of(operation, whole, round_to or 1)
            if kind.signature not in kinds:
                curve = measure_curve(kind, lambda sizes, of=kind: measured.of(sized(of.operation, sizes)))  # type: ignore[misc]
                kinds[kind.signature] = -1 if curve is None else len(curves)
                curves += [] if curve is None else [curve]
            if (at := kinds[kind.signature]) >= 0:
                first, second = (*(tuple([widths[i] for i in axis]) for axis in kind.axes), ())[:2]
                terms[at, (first, second)] = terms.get((at, (first, second)), 0) + 1
    finally:
        measured.save()
    calls = calls_of(model, example_inputs)
    times = Times(found.widths, [Term(*key, n) for key, n in terms.items()], curves, clock, calls)
    return times.calibrated(plan.counts(), clock.model(model, calls))
