"""Norms that a forward spells out: a mean over channels is allowed where all it does is to divide its own channels.

``x * rsqrt(mean(x²) + eps)``, ``x / mean(x)`` and ``x / |x|`` (``F.normalize``) stay what they are under a factor on x,
and so a mean (or an L2 norm) over the kept channels is what the norm means. So is ``x - mean(x)`` where it is divided
by ``sqrt(mean((x - mean(x))²) + eps)`` or by x's standard deviation, a LayerNorm. Such a mean is followed to where it
is used; used in any other way its channels stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from .labels import LabelMaps, Labels
from .notes import Statistic, note_on, read_note
from .walk import Walk

_UNCHANGED = ("alias", "contiguous", "clone", "detach", "_to_copy", "to", "type_as", "expand", "expand_as")


_POWERS = {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0, "square": 2.0, "abs": 1.0}


_EPSILON = ("add", "clamp", "clamp_min", "maximum", "mul", "div")


def power_of(labels: Labels) -> tuple[Labels, float]:
    """Which activation a tensor is a power of."""
    return labels.power or (labels, 1.0)


def power_after(walk: Walk, name: str, args: Any) -> tuple[Labels, float] | None:
    """The power that an elementwise op makes of its operand, if that is what it does."""
    name = name.rstrip("_")
    labels = walk.labels(args[0])
    if labels is None:
        return None
    source, degree = power_of(labels)
    if name in _POWERS:
        return source, degree * _POWERS[name]
    if name == "pow" and isinstance(args[1], (int, float)):
        return source, degree * args[1]
    if name == "mul" and isinstance(args[1], Tensor) and walk.labels(args[1]) is labels:
        return source, 2 * degree
    return None


def centred(labels: Labels) -> Labels:
    """What stands for a tensor less its mean over channels."""
    labels.centred = labels.centred or Labels(labels.maps)
    return labels.centred


def statistic_of_output(walk: Walk, name: str, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> Statistic | None:
    """Look at an op's operands before it runs; what its output is, where that is still a statistic."""
    if name.endswith("_as"):  # of the second operand only shape or type count
        tensors = tensors[:1]
    found = [s for t in tensors if (s := read_note(t).statistic) is not None]
    if not found:
        return None
    s = found[0]
    if read_note(args[0]).statistic is s and all(other is s for other in found):
        after = _of_centred(walk, name, args, s) if s.centred else _of_statistic(name, args, tensors, s)
        if after is not None or (s.centred and name in ("mean", "linalg_vector_norm")):  # its rule looks at the dims
            return after
    if len(found) == 1 and name == "sub" and not kwargs and s.mean_of is not None and walk.labels(args[0]) is s.mean_of:
        return Statistic(centred(s.mean_of), 1.0, s.maps, s.reason, centred=True)
    if kwargs or not _divides(walk, name.rstrip("_"), args, found):
        for other in found:
            freeze_statistic(walk, other)
    return None


def _of_statistic(name: str, args: Any, tensors: Sequence[Tensor], s: Statistic) -> Statistic | None:
    """What an op makes of a statistic alone."""
    name = name.rstrip("_")
    if name in _UNCHANGED:
        return s
    s = replace(s, mean_of=None)
    if name in _POWERS:
        return replace(s, degree=s.degree * _POWERS[name])
    if name == "pow" and isinstance(args[1], (int, float)):
        return replace(s, degree=s.degree * args[1])
    return s if name in _EPSILON and all(t.dim() == 0 for t in tensors[1:]) else None


def _of_centred(walk: Walk, name: str, args: Any, s: Statistic) -> Statistic | None:
    """What an op makes of channels less their mean, which may only go into their own norm."""
    if name in _UNCHANGED:
        return s
    source, degree = power_after(walk, name, args) or (None, 0.0)
    return replace(s, degree=degree) if source is s.source else None


def settle(walk: Walk, s: Statistic, out: Tensor) -> None:
    """Note what an op's output is."""
    note_on(out).statistic = s
    labels = walk.labels(out)
    if s.centred and labels is not None and labels.power is None:
        labels.power = s.source, s.degree


def note_statistic(walk: Walk, name: str, labels: Labels, over: LabelMaps, out: Any, place: str) -> None:
    """Note a reduction over channels that a norm may be made of."""
    reason = f"reduces over channels in {place}"
    if name in ("var", "std", "var_mean", "std_mean"):
        spread = Statistic(centred(labels), 2.0 if name.startswith("var") else 1.0, over, reason)
        found = [spread, Statistic(*power_of(labels), over, reason, mean_of=labels)]
    else:
        found = [Statistic(*power_of(labels), over, reason, mean_of=labels if name == "mean" else None)]
    for o, s in zip(out if isinstance(out, tuple) else (out,), found):
        note_on(o).statistic = s
    walk.statistics += 1


def _divides(walk: Walk, name: str, args: Any, found: Sequence[Statistic]) -> bool:
    """Whether a statistic's degree takes that of its own source away."""
    if name not in ("mul", "div") or len(args) < 2 or not all(isinstance(a, Tensor) for a in args[:2]):
        return False
    several = [s for s in found if not s.centred]
    if len(several) != 1 or len(found) > 2:
        return False
    s = several[0]
    first = read_note(args[0]).statistic is s
    if first and name == "div":
        return False
    labels = walk.labels(args[1] if first else args[0])
    if labels is None:
        return False
    source, degree = power_of(labels)
    return source is s.source and degree + (s.degree if name == "mul" else -s.degree) == 0


def freeze_statistic(walk: Walk, s: Statistic) -> None:
    for label_map in s.maps:
        walk.graph.freeze(label_map, s.reason)
