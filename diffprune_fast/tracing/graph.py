"""What happens where labels meet: edges between channels, frozen channels with reasons, constraints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .labels import Layer, Layers, varying

if TYPE_CHECKING:
    from .heads import Heads


Shape = Sequence[int]


@dataclass
class Recorded:
    """A constraint in node ids, as an op left it."""

    kind: str
    place: str
    rows: np.ndarray


@dataclass
class Graph:
    """What a walk collects: edges between channels, frozen channels with reasons, constraints.

    heads: the attentions whose heads go as a whole (None: their dims count one by one).
    """

    n_nodes: int
    edges: list[tuple[np.ndarray, np.ndarray, str]] = field(default_factory=list)
    frozen: list[tuple[np.ndarray, str]] = field(default_factory=list)
    constraints: list[Recorded] = field(default_factory=list)
    heads: Heads | None = None

    def __post_init__(self) -> None:
        self._row_of = np.zeros(self.n_nodes, np.int32)
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
        self.constraints.append(Recorded(kind, place, rows))
        self._row_of[rows] = self._n_rows + 1 + np.arange(rows.shape[0], dtype=np.int32)[:, None]
        self._n_rows += rows.shape[0]

    def tie(self, layer: Layer, dims: Sequence[int], place: str) -> None:
        """Make one unit of all channels that differ along ``dims`` only."""
        first = layer[tuple([slice(0, 1) if d in dims else slice(None) for d in range(layer.ndim)])]
        self.link(first, layer, place)

    def meet(self, a: Layers, sa: Shape, b: Layers, sb: Shape, place: str, summed: Sequence[int] = ()) -> Layers:
        """Join two tensors' layers in one index space (both of its rank; size 1 where an operand has no such dim).

        ``summed`` are the dims that the operation reduces afterwards (a contraction's k).
        """
        if len(a) == 1 and len(b) == 1 and a[0].shape == b[0].shape:
            self.link(a[0], b[0], place)
            return a
        kept = [layer for layer in a if self._settle(layer, b, sb, place, summed, first=True)]
        for layer in b:
            if self._settle(layer, a, sa, place, summed, first=False) and not any(
                varying(layer) == varying(other) for other in kept
            ):
                kept.append(layer)
        return tuple(kept)

    def meet_all(self, operands: Iterable[tuple[Layers, Shape]], ndim: int, place: str) -> Layers:
        """:meth:`meet` for any number of tensors' layers and shapes, all of rank ``ndim``."""
        layers: Layers = ()
        shape: Shape = (1,) * ndim
        for mine, other in operands:
            layers = self.meet(layers, shape, mine, other, place) if layers or mine else ()
            shape = tuple([max(a, b) for a, b in zip(shape, other)])
        return layers

    def _settle(
        self, layer: Layer, others: Layers, shape: Shape, place: str, summed: Sequence[int], first: bool
    ) -> bool:
        """Join one layer with the other operand; False if it ends here (it was frozen)."""
        mine = varying(layer)
        covered: set[int] = set()
        for other in others:
            theirs = varying(other)
            shared = set(mine) & set(theirs)
            if not shared:
                continue
            covered |= shared
            if theirs == mine:
                if first:
                    self.link(layer, other, place)
            elif set(theirs) < set(mine):
                self._smaller(layer, other, place, summed)
            elif not set(mine) < set(theirs):
                self.freeze(layer, f"crosses other channels in {place}")
                self.freeze(other, f"crosses other channels in {place}")
        anonymous = [d for d in mine if shape[d] > 1 and d not in covered]
        if not anonymous:
            return True
        if len(anonymous) == len(mine):
            self.freeze(layer, f"meets an unlabelled dimension in {place}")
            return False
        if mine[-1] in anonymous:
            self.tie(layer, anonymous, place)
        return True

    def _smaller(self, layer: Layer, other: Layer, place: str, summed: Sequence[int]) -> None:
        """``other`` varies along some of ``layer``'s dims only."""
        theirs = varying(other)
        rows = varying(layer)[-1] not in theirs
        if rows and not set(theirs) & set(summed):
            self.freeze(other, f"has one value per row (head) in {place}")
        else:
            self.link(layer, other, place)

    def reduce(self, layers: Layers, dims: Sequence[int], place: str, what: str) -> Layers:
        """A reduction over ``dims``: labelled channels in them would change it, so they stay."""
        kept = []
        for layer in layers:
            if any(layer.shape[d] > 1 for d in dims):
                self.freeze(layer, f"{what} over channels in {place}")
            else:
                kept.append(layer)
        return tuple(kept)

    def goes_whole(self, rows: np.ndarray, n_heads: int, module: str) -> bool:
        """Whether all channels of a row, ``(n, channels)``, are removed together wherever the row is."""
        return self.heads is not None and self.heads.split_in(module, n_heads, rows.shape[1])

    def by_heads(self, layer: Layer, module: str, place: str) -> Layer | None:
        """A layer that was just split into heads, as one over heads only; None where the dims count on their own."""
        dims = varying(layer)
        for i in range(len(dims) - 1, 0, -1):
            n_dims = int(np.prod([layer.shape[d] for d in dims[i:]]))
            if self.goes_whole(layer.reshape(-1, n_dims), layer.shape[dims[i - 1]], module):
                self.tie(layer, dims[i:], place)
                return layer[tuple([slice(0, 1) if d in dims[i:] else slice(None) for d in range(layer.ndim)])]
        return None

    def moved(self, before: Layer, after: Layer | None, place: str) -> Layer | None:
        """Settle what a reshape did to a layer: split dims are constrained, interleaved ones are tied."""
        if after is None:
            return None
        dims = varying(after)
        sizes = [before.shape[d] for d in varying(before)]
        if sizes == [after.shape[d] for d in dims]:
            return after
        if 2 <= len(sizes) >= len(dims):
            self._merged(before, place)
        if len(dims) >= 2:
            if after.size > before.size and _repeats(after.reshape(after.shape[dims[0]], -1)):
                self.tie(after, dims[1:], place)
                return after[tuple([slice(0, 1) if d in dims[1:] else slice(None) for d in range(after.ndim)])]
            self.constrain("view", place, after.reshape(-1, after.shape[dims[-1]]))
        return after

    def _merged(self, layer: Layer, place: str) -> None:
        """Flattening (rows, columns) keeps the order only row by row; the other way round the rows must agree."""
        flat = layer.reshape(-1, layer.shape[varying(layer)[-1]])
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
