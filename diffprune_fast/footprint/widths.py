"""Widths of a model as functions of how many units its groups keep, each of them once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..plan.plan import Plan

ONE = 0  # the width that is always 1


@dataclass(frozen=True)
class Widths:
    """``base + per_group @ counts``, rounded. base: ``(n_widths,)``; per_group: ``(n_widths, n_groups)``."""

    base: np.ndarray
    per_group: np.ndarray

    def at(self, counts: np.ndarray) -> np.ndarray:
        """``(…, n_widths)`` of kept units per group, ``(…, n_groups)``."""
        return np.maximum(np.rint(self.base + counts @ self.per_group.T), 1.0)


class WidthNumbers:
    """Numbers for widths, as a walk meets them: sets of channels that shrink alike have the same one."""

    def __init__(self, plan: Plan, unit_of: np.ndarray) -> None:
        self._plan, self._unit_of = plan, unit_of
        self._sizes = np.maximum(np.diff(plan.offsets), 1)
        self._of_labels: dict[bytes, int] = {}
        self._of_row: dict[bytes, int] = {}
        self._rows: list[np.ndarray] = []
        self._number(np.append(1.0, np.zeros(len(plan.groups))))

    def number(self, labels: np.ndarray) -> int:
        """The width that a set of channel ids makes; -1 where it never changes."""
        key = labels.tobytes()
        if key not in self._of_labels:
            units = self._unit_of[labels.reshape(-1)]
            groups = self._plan.group_of[units[units >= 0]]
            per_group = np.bincount(groups, minlength=len(self._sizes)) / self._sizes
            row = np.append(float((units < 0).sum()), per_group)
            self._of_labels[key] = self._number(row) if len(groups) else -1
        return self._of_labels[key]

    def _number(self, row: np.ndarray) -> int:
        key = row.round(9).tobytes()
        if key not in self._of_row:
            self._of_row[key] = len(self._rows)
            self._rows.append(row)
        return self._of_row[key]

    def table(self) -> Widths:
        rows = np.stack(self._rows)
        return Widths(rows[:, 0], rows[:, 1:])


@dataclass(frozen=True)
class Shape:
    """A tensor's shape at any widths.

    sizes: the whole one. widths: per dim the number of the width that it is, or -1 for a dim that stays. order: its
    dims from the outermost in memory to the innermost. itemsize: bytes of an element.
    """

    sizes: tuple[int, ...]
    widths: tuple[int, ...]
    order: tuple[int, ...]
    dtype: str
    itemsize: int

    @property
    def follows(self) -> tuple[int, ...]:
        """The widths that it has."""
        return tuple([w for w in self.widths if w >= 0])


class Bytes:
    """Bytes of tensors, those of the same widths together.

    index: ``(n, most)`` numbers of widths whose product they are; factor: ``(n,)`` bytes for each of that.
    """

    def __init__(self, shapes: Sequence[Shape]) -> None:
        most = max((len(s.follows) for s in shapes), default=1) or 1
        each = np.full((len(shapes), most), ONE, np.int64)
        of_each = np.zeros(len(shapes))
        for i, s in enumerate(shapes):
            each[i, : len(s.follows)] = sorted(s.follows)
            of_each[i] = s.itemsize * np.prod([n for n, w in zip(s.sizes, s.widths) if w < 0], dtype=float)
        self.index, where = np.unique(each, axis=0, return_inverse=True)
        self._sums = np.zeros((len(shapes), len(self.index)))
        self._sums[np.arange(len(shapes)), where.reshape(-1)] = of_each
        self.factor = self._sums.sum(axis=0)

    def added(self, chosen: np.ndarray) -> np.ndarray:
        """For rows of the shapes that are chosen, ``(m, n_shapes)``: which share of each of ours that is."""
        return np.asarray(chosen @ self._sums) / np.maximum(self.factor, 1e-30)

    def at(self, sizes: np.ndarray) -> np.ndarray:
        """``(…, n)`` at these widths, ``(…, n_widths)``."""
        return np.asarray(self.factor * sizes[..., self.index].prod(axis=-1))
