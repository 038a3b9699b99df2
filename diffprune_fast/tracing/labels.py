"""Labels beside activations: which channel every element belongs to.

A *label map* is an integer array of the tensor's rank, of size 1 along the dims it doesn't depend on. Its entries are
channel ids (see channels.py); 0 stands for "always stays". A tensor may carry several maps at once (a weight
has one per dim). Label maps of size 1 don't exist: a dim of size 1 has nothing to remove.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LabelMap = np.ndarray
LabelMaps = tuple[LabelMap, ...]


@dataclass(frozen=True)
class FoldTarget:
    """A parameter that can take a factor. rows: which of dim 0; None: those whose channels the tensor's labels name."""

    name: str
    rows: np.ndarray | None


@dataclass
class Labels:
    """What is known of a tensor's channels.

    maps: see above. fold_targets: parameters whose common factor is a factor of this tensor, or None (unknown).

    power: the labels of another tensor, and which power of it this one is (None: it is no other's). centred: what
    stands for this tensor less its mean, once something has asked for it. zero: it is zero in every channel whose
    parameters are, so that a sum over channels is what it is without those.
    """

    maps: LabelMaps
    fold_targets: tuple[FoldTarget, ...] | None = None
    power: tuple[Labels, float] | None = None
    centred: Labels | None = None
    zero: bool = False


def varying(label_map: LabelMap) -> tuple[int, ...]:
    """The dims along which a label map's labels differ."""
    return tuple([d for d, n in enumerate(label_map.shape) if n > 1])


def compress(a: np.ndarray, compact: int) -> LabelMap | None:
    """Drop broadcast dims; None where nothing varies. ``compact``: the size before; a larger copy may repeat a dim."""
    if 0 in a.strides:
        a = a[tuple([slice(0, 1) if s == 0 else slice(None) for s in a.strides])]
    if a.size > compact:
        for d in range(a.ndim):
            if a.shape[d] > 1 and (a == a.take([0], axis=d)).all():
                a = a.take([0], axis=d)
    return a if a.size > 1 else None
