"""Norms that a forward spells out: a mean over channels is allowed where all it does is to divide its own channels.

``x * rsqrt(mean(x²) + eps)``, ``x / mean(x)`` and ``x / |x|`` (``F.normalize``) stay what they are under a factor on x,
and so a mean (or an L2 norm) over the kept channels is what the norm means. Such a mean is followed to where it is
used; used in any other way its channels stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from .labels import Labels
from .notes import Statistic, read_note
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


def statistic_of_output(walk: Walk, name: str, args: Any, tensors: Sequence[Tensor]) -> Statistic | None:
    """Look at an op's operands before it runs; what its output is, where that is still a statistic."""
    found = [s for t in tensors if (s := read_note(t).statistic) is not None]
    if not found:
        return None
    s = found[0]
    name = name.rstrip("_")
    if len(found) == 1 and read_note(args[0]).statistic is s:
        if name in _UNCHANGED:
            return s
        if name in _POWERS:
            return replace(s, degree=s.degree * _POWERS[name])
        if name == "pow" and isinstance(args[1], (int, float)):
            return replace(s, degree=s.degree * args[1])
        if name in _EPSILON and all(t.dim() == 0 for t in tensors[1:]):
            return s
    if not (len(found) == 1 and _divides(walk, name, args, s)):
        for other in found:
            freeze_statistic(walk, other)
    return None


def _divides(walk: Walk, name: str, args: Any, s: Statistic) -> bool:
    """Whether the statistic's degree takes that of its own source away."""
    if name not in ("mul", "div") or len(args) < 2 or not all(isinstance(a, Tensor) for a in args[:2]):
        return False
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
