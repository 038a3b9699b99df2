"""What a walk hangs on the tensors of a forward: one note under one attribute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .labels import LabelMaps, Labels


@dataclass
class Content:
    """What is in a tensor: "zero" and "uniform" everywhere the same, "ids" 0, 1, 2, ..., "written" anything.

    diagonal: the tensor of zeros whose diagonal, and nothing else, was written.
    """

    kind: str
    diagonal: int | None = None


@dataclass(frozen=True)
class Statistic:
    """What was made of a mean over channels: it goes with ``source`` to the power ``degree``.

    maps: the channels that the mean is over. mean_of: the labels of what it is the plain mean of. centred: it has
    channels still, those of ``source`` less their mean.
    """

    source: Labels
    degree: float
    maps: LabelMaps
    reason: str
    mean_of: Labels | None = None
    centred: bool = False


@dataclass(slots=True)
class Origin:
    """How a tensor was made, of inputs and numbers alone. at: when. value: what is in it, once it was computed."""

    at: int
    func: Any
    args: Any
    kwargs: Any
    value: Tensor | None = None


@dataclass(slots=True)
class TensorNote:
    """What is known of a tensor.

    labels: which channel each element belongs to. parameter: the name of the parameter or buffer that it stands for.
    content: what is in it, if the forward made it of numbers alone. statistic: what it holds of a mean over channels.
    made: whether the walk saw how the values that it holds were made. origin: how to make them, on meta.
    """

    labels: Labels | None = None
    parameter: str | None = None
    content: Content | None = None
    statistic: Statistic | None = None
    made: bool = False
    origin: Origin | None = None


_NOTHING = TensorNote()


def read_note(t: Any) -> TensorNote:
    """A tensor's note, or an empty one, which is not to be written to."""
    return getattr(t, "_walk_note", _NOTHING)


def note_on(t: Tensor) -> TensorNote:
    """A tensor's note, to write to."""
    note: TensorNote | None = getattr(t, "_walk_note", None)
    if note is None:
        note = t._walk_note = TensorNote()  # type: ignore[attr-defined]
    return note
