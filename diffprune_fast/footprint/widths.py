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


def table_of(shapes: Sequence[Shape]) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of tensors as products: ``(n,)`` factors and ``(n, most)`` numbers of widths."""
    most = max((len(s.follows) for s in shapes), default=1)
    index = np.full((len(shapes), max(most, 1)), ONE, np.int64)
    factor = np.zeros(len(shapes))
    for i, s in enumerate(shapes):
        index[i, : len(s.follows)] = s.follows
        factor[i] = s.itemsize * np.prod([n for n, w in zip(s.sizes, s.widths) if w < 0], dtype=float)
    return factor, index
