"""Seconds of operations between the widths at which they were measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .replay import Kind

# Widths per axis that are measured while the other axis is whole: devices work in blocks, so that time has steps.
_SCAN = 24
# Of an operation that takes longer than this, in seconds, and of those whose time follows the size of what they give.
_LONG, _FEW = 0.02, 6
_BY_SIZE = (1.0, 0.75, 0.5, 0.25, 0.1)
# Inner widths, where both axes shrink.
_INNER = (0.6, 0.25)
LEAST = 0.1


@dataclass(frozen=True)
class Curve:
    """Seconds of one kind of operation.

    scans: per axis the sorted shares that were measured while all else is whole, and the seconds there. inner: the
    sorted shares of each axis at which both were measured, 1 among them, and the seconds, ``(n, m)``; of one axis none.
    """

    scans: tuple[tuple[np.ndarray, np.ndarray], ...]
    inner: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None


class Curves:
    """Many of them as one table, to be looked up all at once."""

    def __init__(self, curves: Sequence[Curve]) -> None:
        one = np.ones(1)
        scans = [(*c.scans, (one, one))[:2] for c in curves]
        inner = [(one, one, np.ones((1, 1))) if c.inner is None else c.inner for c in curves]
        self._scans = [_packed([s[i] for s in scans]) for i in range(2)]
        self._knots = [_packed([(a[i], a[i]) for a in inner]) for i in range(2)]
        most = [k.xs.shape[1] for k in self._knots]
        self._inner = np.ones((len(curves), *most))
        for table, (a, b, seconds) in zip(self._inner, inner):
            table[: len(a), : len(b)] = seconds

    def at(self, curve: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """``(n,)`` seconds of these curves at these shares of the first and the second axis.

        Where one axis is whole it is what was measured along the other; inside, the bilinear table takes the steps of
        both.
        """
        one = np.ones(len(x))
        along = self._scans[0].at(curve, x) * self._scans[1].at(curve, y)
        edges = self._between(curve, x, one) * self._between(curve, one, y)
        return np.asarray(along * self._between(curve, x, y) / np.maximum(edges, 1e-30))

    def _between(self, curve: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        (i, k, u), (j, m, v) = self._knots[0].cell(curve, x), self._knots[1].cell(curve, y)
        t = self._inner
        low = t[curve, i, j] * (1 - v) + t[curve, i, m] * v
        return np.asarray(low * (1 - u) + (t[curve, k, j] * (1 - v) + t[curve, k, m] * v) * u)


@dataclass(frozen=True)
class _Packed:
    """Lines between points, one a row: ``(n, most)``, filled up at the right. last: ``(n,)`` places of the last."""

    xs: np.ndarray
    ys: np.ndarray
    last: np.ndarray

    def cell(self, row: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The points left and right of ``x`` and how far it is between them; beyond the ends, the end."""
        last = self.last[row]
        i = np.clip((x[:, None] >= self.xs[row]).sum(axis=1) - 1, 0, np.maximum(last - 1, 0))
        k = np.minimum(i + 1, last)
        left, right = self.xs[row, i], self.xs[row, k]
        return i, k, np.clip((x - left) / np.maximum(right - left, 1e-12), 0.0, 1.0)

    def at(self, row: np.ndarray, x: np.ndarray) -> np.ndarray:
        i, k, u = self.cell(row, x)
        return np.asarray(self.ys[row, i] * (1 - u) + self.ys[row, k] * u)


def _packed(lines: Sequence[tuple[np.ndarray, np.ndarray]]) -> _Packed:
    most = max((len(xs) for xs, _ in lines), default=1)
    tables = np.full((2, len(lines), most), np.inf)
    for i, line in enumerate(lines):
        for table, values in zip(tables, line):
            table[i, : len(values)] = values
    return _Packed(tables[0], tables[1], np.array([len(xs) - 1 for xs, _ in lines], np.int64))


def measure_curve(kind: Kind, seconds_at: Callable[[list[int]], float | None]) -> Curve | None:
    """Measure a kind of operation at widths that suit it; None where it can't be called at its whole widths.

    seconds_at: seconds at the sizes of all its widths, None where it can't be called so.
    """
    whole = seconds_at(list(kind.whole))
    if whole is None:
        return None
    scans = []
    for i, axis in enumerate(kind.axes):
        found = {1.0: whole}
        for share in _shares(kind, axis, whole):
            sizes = kind.sizes(*(share if j == i else 1.0 for j in range(len(kind.axes))))
            seconds = seconds_at(sizes)
            if seconds is not None:
                found[kind.place(sizes)[i]] = seconds
        if len(found) == 1:  # it has to be as it is: nothing known but that it takes less
            found[LEAST] = whole * LEAST
        xs = np.array(sorted(found))
        scans.append((xs, np.array([found[x] for x in xs])))
    return Curve(tuple(scans), _inner(kind, scans, seconds_at) if len(scans) == 2 else None)


def _shares(kind: Kind, axis: tuple[int, ...], whole: float) -> Sequence[float]:
    if not kind.has_steps:
        return _BY_SIZE
    n = kind.whole[axis[0]]
    most = _FEW if whole > _LONG else _SCAN
    step = kind.step * max(1, -(-n // (kind.step * most)))
    return [size / n for size in range(step, n, step) if size >= LEAST * n - step]


def _inner(
    kind: Kind, scans: Sequence[tuple[np.ndarray, np.ndarray]], seconds_at: Callable[[list[int]], float | None]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    knots = [np.unique([1.0, *(xs[np.argmin(abs(xs - share))] for share in _INNER)]) for xs, _ in scans]
    edges = [np.interp(k, *scan) for k, scan in zip(knots, scans)]
    whole = max(float(edges[0][-1]), 1e-30)
    found = np.outer(edges[0], edges[1]) / whole
    for i, a in enumerate(knots[0][:-1]):
        for j, b in enumerate(knots[1][:-1]):
            seconds = seconds_at(kind.sizes(float(a), float(b)))
            found[i, j] = found[i, j] if seconds is None else seconds
    return knots[0], knots[1], found
