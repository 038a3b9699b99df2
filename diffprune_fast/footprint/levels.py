"""Time and memory in terms of kept levels, for the allocation, which asks for every next step of every cluster."""

from __future__ import annotations

import numpy as np

from ..plan.lattice import Lattice
from .curves import Curves
from .widths import Bytes, Widths


def widths_per_level(widths: Widths, lattice: Lattice) -> np.ndarray:
    """``(n_widths, n_clusters)``: how much wider a width is for every level that a cluster keeps."""
    units = lattice.group_sizes / lattice.levels[lattice.cluster]
    per_level = np.zeros((len(widths.base), len(lattice.levels)))
    np.add.at(per_level.T, lattice.cluster, (widths.per_group * units).T)
    return per_level


class TimesOfLevels:
    """Seconds that follow widths, by kept levels; what a step doesn't touch is not looked up again.

    axes: two tables ``(n_terms, most)`` of widths, -1 for none. whole: ``(n_widths,)`` full sizes.
    """

    def __init__(
        self,
        widths: Widths,
        lattice: Lattice,
        axes: list[np.ndarray],
        curve: np.ndarray,
        factor: np.ndarray,
        curves: Curves,
        whole: np.ndarray,
    ) -> None:
        none = np.zeros((1, len(lattice.levels)))
        self._base = np.append(widths.base, 1.0)
        self._per_level = np.concatenate([widths_per_level(widths, lattice), none])
        self._axes, self._curve, self._factor, self._curves, self._whole = axes, curve, factor, curves, whole
        moved = self._per_level != 0
        self._moves = np.logical_or.reduce([moved[axis].any(axis=1) for axis in axes])  # (n_terms, n_clusters)
        self._candidates: tuple[np.ndarray, np.ndarray] | None = None
        self._at = np.zeros(0)

    def change(self, chosen: np.ndarray, cluster: np.ndarray, level: np.ndarray) -> np.ndarray:
        """``(n,)`` seconds more when, each alone, ``cluster[i]`` keeps ``level[i]`` levels."""
        known = self._candidates
        if known is None or not (np.array_equal(known[0], cluster) and np.array_equal(known[1], level)):
            self._candidates = cluster.copy(), level.copy()
            self._row, self._term = np.nonzero(self._moves.T[cluster])
            self._then = np.zeros(len(self._row))
            self._now = np.zeros(len(self._factor))
            stale = np.ones(len(self._factor), bool)
        else:
            stale = self._moves[:, chosen != self._at].any(axis=1)
        self._at = chosen.copy()
        sizes = self._base + self._per_level @ chosen
        terms = np.flatnonzero(stale)
        self._now[terms] = self._seconds(terms, [sizes[axis[terms]] for axis in self._axes])
        pairs = np.flatnonzero(stale[self._term])
        term, c = self._term[pairs], cluster[self._row[pairs]]
        step = (level[self._row[pairs]] - chosen[c])[:, None]
        then = [sizes[axis[term]] + self._per_level[axis[term], c[:, None]] * step for axis in self._axes]
        self._then[pairs] = self._seconds(term, then)
        before = self._moves.T.astype(float) @ self._now
        return np.asarray(np.bincount(self._row, weights=self._then, minlength=len(cluster)) - before[cluster])

    def _seconds(self, term: np.ndarray, sizes: list[np.ndarray]) -> np.ndarray:
        x, y = (
            (np.maximum(np.rint(size), 1.0) / self._whole[axis[term]]).prod(axis=1)
            for size, axis in zip(sizes, self._axes)
        )
        return np.asarray(self._factor[term] * self._curves.at(self._curve[term], x, y))


class BytesOfLevels:
    """Peak bytes by kept levels."""

    def __init__(self, widths: Widths, lattice: Lattice, parameters: Bytes, made: Bytes, live: np.ndarray) -> None:
        self._base, self._per_level = widths.base, widths_per_level(widths, lattice)
        self._tables, self._live = (parameters, made), live
        moved = self._per_level != 0
        self._moves = [moved[table.index].any(axis=1) for table in self._tables]  # (n, n_clusters) each

    def change(self, chosen: np.ndarray, cluster: np.ndarray, level: np.ndarray) -> np.ndarray:
        """``(n,)`` bytes more when, each alone, ``cluster[i]`` keeps ``level[i]`` levels."""
        sizes = np.maximum(np.rint(self._base + self._per_level @ chosen), 1.0)
        now = [table.at(sizes) for table in self._tables]
        live = self._live @ now[1]
        found = np.zeros(len(cluster))
        for c in np.unique(cluster).tolist():
            mine = np.flatnonzero(cluster == c)
            steps = np.outer(level[mine] - chosen[c], self._per_level[:, c])
            then = np.maximum(np.rint(self._base + self._per_level @ chosen + steps), 1.0)
            weights, made = (
                table.factor[moves[:, c]] * then[:, table.index[moves[:, c]]].prod(axis=2) - before[moves[:, c]]
                for table, moves, before in zip(self._tables, self._moves, now)
            )
            peaks = (live + made @ self._live[:, self._moves[1][:, c]].T).max(axis=1, initial=0.0)
            found[mine] = weights.sum(axis=1) + peaks - live.max(initial=0.0)
        return found
