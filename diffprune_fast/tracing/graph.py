"""What happens where labels meet: edges between channels, frozen channels with reasons, constraints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .labels import LabelMap, LabelMaps, varying

if TYPE_CHECKING:
    from .heads import Heads


Shape = Sequence[int]


@dataclass
class ChannelConstraint:
    """A constraint over channel ids, as an op left it."""

    kind: str
    place: str
    rows: np.ndarray


@dataclass
class Graph:
    """What a walk collects: edges between channels, frozen channels with reasons, constraints.

    heads: the attentions whose heads go as a whole (None: their dims count one by one).
    """

    n_channels: int
    edges: list[tuple[np.ndarray, np.ndarray, str]] = field(default_factory=list)
    frozen: list[tuple[np.ndarray, str]] = field(default_factory=list)
    constraints: list[ChannelConstraint] = field(default_factory=list)
    heads: Heads | None = None

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """As if nothing had been collected."""
        for found in (self.edges, self.frozen, self.constraints):
            found.clear()
        self._row_of = np.zeros(self.n_channels, np.int32)
        self._n_rows = 0

    def link(self, a: np.ndarray, b: np.ndarray, place: str) -> None:
        """Channels that must go together, element by element (broadcast)."""
        if a is b:
            return
        if a.shape != b.shape:
            a, b = np.broadcast_arrays(a, b)
        self.edges.append((a.reshape(-1), b.reshape(-1), place))

    def freeze(self, a: np.ndarray, reason: str) -> None:
        self.frozen.append((a.reshape(-1), reason))

    def constrain(self, kind: str, place: str, rows: np.ndarray) -> None:
        """Every row must keep equally many of its channels."""
        if rows.shape[0] < 2 and kind != "norm":
            return
        self.constraints.append(ChannelConstraint(kind, place, rows))
        self._row_of[rows] = self._n_rows + 1 + np.arange(rows.shape[0], dtype=np.int32)[:, None]
        self._n_rows += rows.shape[0]

    def tie(self, label_map: LabelMap, dims: Sequence[int], place: str) -> None:
        """Make one unit of all channels that differ along ``dims`` only."""
        first = label_map[tuple([slice(0, 1) if d in dims else slice(None) for d in range(label_map.ndim)])]
        self.link(first, label_map, place)

    def join(
        self, a: LabelMaps, sa: Shape, b: LabelMaps, sb: Shape, place: str, summed: Sequence[int] = ()
    ) -> LabelMaps:
        """Join two tensors' maps in one index space (both of its rank; size 1 where an operand has no such dim).

        ``summed`` are the dims that the operation reduces afterwards (a contraction's k).
        """
        if len(a) == 1 and len(b) == 1 and a[0].shape == b[0].shape:
            self.link(a[0], b[0], place)
            return a
        kept = [label_map for label_map in a if self._join_one(label_map, b, sb, place, summed, first=True)]
        for label_map in b:
            if self._join_one(label_map, a, sa, place, summed, first=False) and not any(
                varying(label_map) == varying(other) for other in kept
            ):
                kept.append(label_map)
        return tuple(kept)

    def join_all(self, operands: Iterable[tuple[LabelMaps, Shape]], ndim: int, place: str) -> LabelMaps:
        """:meth:`join` for any number of tensors' maps and shapes, all of rank ``ndim``."""
        maps: LabelMaps = ()
        shape: Shape = (1,) * ndim
        for mine, other in operands:
            maps = self.join(maps, shape, mine, other, place) if maps or mine else ()
            shape = tuple([max(a, b) for a, b in zip(shape, other)])
        return maps

    def _join_one(
        self, label_map: LabelMap, others: LabelMaps, shape: Shape, place: str, summed: Sequence[int], first: bool
    ) -> bool:
        """Join one label map with the other operand; False if it ends here (it was frozen)."""
        mine = varying(label_map)
        covered: set[int] = set()
        for other in others:
            theirs = varying(other)
            shared = set(mine) & set(theirs)
            if not shared:
                continue
            covered |= shared
            if theirs == mine:
                if first:
                    self.link(label_map, other, place)
            elif set(theirs) < set(mine):
                self._join_smaller(label_map, other, place, summed)
            elif not set(mine) < set(theirs):
                self.freeze(label_map, f"crosses other channels in {place}")
                self.freeze(other, f"crosses other channels in {place}")
        anonymous = [d for d in mine if shape[d] > 1 and d not in covered]
        if not anonymous:
            return True
        if len(anonymous) == len(mine):
            self.freeze(label_map, f"meets an unlabelled dimension in {place}")
            return False
        if mine[-1] in anonymous:
            self.tie(label_map, anonymous, place)
        return True

    def _join_smaller(self, label_map: LabelMap, other: LabelMap, place: str, summed: Sequence[int]) -> None:
        """Join a label map with one that varies along some of its dims only."""
        theirs = varying(other)
        rows = varying(label_map)[-1] not in theirs
        if rows and not set(theirs) & set(summed):
            self.freeze(other, f"has one value per row (head) in {place}")
        else:
            self.link(label_map, other, place)

    def reduce(self, maps: LabelMaps, dims: Sequence[int], place: str, what: str) -> LabelMaps:
        """A reduction over ``dims``: labelled channels in them would change it, so they stay."""
        kept = []
        for label_map in maps:
            if any(label_map.shape[d] > 1 for d in dims):
                self.freeze(label_map, f"{what} over channels in {place}")
            else:
                kept.append(label_map)
        return tuple(kept)

    def goes_whole(self, rows: np.ndarray, n_heads: int, module: str) -> bool:
        """Whether all channels of a row, ``(n, channels)``, are removed together wherever the row is."""
        return self.heads is not None and self.heads.split_in(module, n_heads, rows.shape[1])

    def by_heads(self, label_map: LabelMap, module: str, place: str) -> LabelMap | None:
        """A label map just split into heads, as one over heads only; None where the dims count on their own."""
        dims = varying(label_map)
        for i in range(len(dims) - 1, 0, -1):
            n_dims = int(np.prod([label_map.shape[d] for d in dims[i:]]))
            if self.goes_whole(label_map.reshape(-1, n_dims), label_map.shape[dims[i - 1]], module):
                self.tie(label_map, dims[i:], place)
                return label_map[tuple([slice(0, 1) if d in dims[i:] else slice(None) for d in range(label_map.ndim)])]
        return None

    def follow_reshape(self, before: LabelMap, after: LabelMap | None, place: str) -> LabelMap | None:
        """Take a label map through a reshape: split dims are constrained, interleaved ones are tied."""
        if after is None:
            return None
        dims = varying(after)
        sizes = [before.shape[d] for d in varying(before)]
        if sizes == [after.shape[d] for d in dims]:
            return after
        if 2 <= len(sizes) >= len(dims):
            self._flatten(before, place)
        if len(dims) >= 2:
            if after.size > before.size and _repeats(after.reshape(after.shape[dims[0]], -1)):
                self.tie(after, dims[1:], place)
                return after[tuple([slice(0, 1) if d in dims[1:] else slice(None) for d in range(after.ndim)])]
            self.constrain("view", place, after.reshape(-1, after.shape[dims[-1]]))
        return after

    def _flatten(self, label_map: LabelMap, place: str) -> None:
        """Flattening (rows, columns) keeps the order only row by row; the other way round the rows must agree."""
        flat = label_map.reshape(-1, label_map.shape[varying(label_map)[-1]])
        row_of = self._row_of[flat]
        if (row_of == row_of[:, :1]).all():
            return
        if (row_of == row_of[:1]).all():
            self.link(flat[:, :1], flat, place)
        else:
            self.freeze(flat, f"is flattened across its rows in {place}")


def _repeats(rows: np.ndarray) -> bool:
    """Whether a label stands twice in one row."""
    ordered = np.sort(rows, axis=1)
    return bool((ordered[:, 1:] == ordered[:, :-1]).any())
