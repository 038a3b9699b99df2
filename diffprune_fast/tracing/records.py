"""What a walk leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .labels import LabelMap, LabelMaps, Labels, varying


@dataclass(frozen=True)
class Attended:
    """An operand of an attention product: heads of how many dims, and its channels, ``(rows, n_dims)``, if labelled."""

    module: str
    n_heads: int
    n_dims: int
    rows: np.ndarray | None

    @classmethod
    def of(cls, module: str, label_map: LabelMap) -> Attended | None:
        """None where the label map has no rows: there is one head, or the heads were not split."""
        dims = varying(label_map)
        if len(dims) < 2:
            return None
        rows = label_map.reshape(-1, label_map.shape[dims[-1]])
        rows = rows[np.unique(rows[:, 0], return_index=True)[1]]
        return cls(module, len(rows), rows.shape[1], rows)


_Sizes = tuple[tuple[int, ...], ...]


def place_of(module: str, op: Any) -> str:
    """How messages name an operation."""
    return f"{module or 'model'} ({op.overloadpacket.__name__})"


@dataclass(slots=True)
class Step:
    """An operation.

    values: its numbers. contents: shape and checksum of real tensors that it brings among activations. sizes and
    labels: of its outputs. read and operands: sizes and labels of the tensors that it reads. groups: a GroupNorm's
    groups and channels. written: sizes of what it writes into, and of the memory that this is a part of.
    """

    op: Any
    module: str
    values: tuple[Any, ...]
    contents: tuple[tuple[tuple[int, ...], int], ...]
    sizes: _Sizes
    labels: tuple[Labels | None, ...]
    read: _Sizes
    operands: tuple[Labels | None, ...]
    labelled: bool
    groups: tuple[int, int] | None = None
    written: tuple[tuple[int, ...], int] | None = None

    @property
    def place(self) -> str:
        return place_of(self.module, self.op)

    @property
    def channels(self) -> np.ndarray:
        """The channels that the operation works on."""
        found = [x.reshape(-1) for labels in self.operands if labels is not None for x in labels.maps]
        return np.concatenate(found) if found else np.zeros(0, np.int32)


@dataclass
class ScaleTerm:
    """A softmax over ``n_dims`` head dims. label_map: the queries' (head, dim) channels; targets: name to rows."""

    place: str
    n_dims: int
    label_map: LabelMap
    targets: dict[str, np.ndarray]

    @property
    def first_row(self) -> np.ndarray:
        return self.label_map.reshape(-1, self.label_map.shape[-1])[0]


Calls = Sequence[tuple[str, tuple[Any, ...], dict[str, Any]]]


@dataclass
class CostTerm:
    place: str
    scale: int
    maps: LabelMaps
    attention: bool
