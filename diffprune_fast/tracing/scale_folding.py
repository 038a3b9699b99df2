"""The softmax scale follows the head size: when head dims go, a factor must go into what feeds the queries alone.

A tensor's *feeds* are the parameters that take a factor of it. They pass through what is linear; where a tensor that
has them is used in any other way, they have leaked: a factor in them would change more than the queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .labels import Feed, Labels, Layer
from .records import ScaleTerm

if TYPE_CHECKING:
    from .walk import Walk


def of_projection(walk: Walk, weight: Tensor, bias: Tensor | None) -> tuple[Feed, ...] | None:
    """A linear layer's output takes a factor through the rows of its weight and bias that its labels name."""
    names = [walk.name_of(p) for p in (weight, bias) if p is not None]
    return None if None in names else tuple([Feed(n, None) for n in names if n is not None])


def of_parameters(walk: Walk, *parameters: Tensor | None) -> tuple[Feed, ...] | None:
    """What is multiplied by a parameter (and has others added) takes a factor through all of it."""
    names = [walk.name_of(p) for p in parameters if p is not None]
    if not names or None in names:
        return None
    return tuple([Feed(n, np.arange(walk.nodes.shapes[n][0])) for n in names if n is not None])


def of_elementwise(walk: Walk, name: str, args: Sequence[Any]) -> tuple[Feed, ...] | None:
    """Sums take a factor through all their terms, products through one of theirs."""
    name = name.rstrip("_")
    tensors = [a for a in args if isinstance(a, Tensor)]
    if any(hasattr(t, "_statistic") for t in tensors):  # a norm takes every factor out
        return None
    if name in ("add", "sub"):
        return together(walk, tensors) if len(tensors) == len(args) else None
    if name not in ("mul", "div"):
        return None
    labelled = [t for t in tensors if walk.labels(t) is not None]
    activations = [t for t in labelled if walk.name_of(t) is None]
    if len(activations) > 1 or (name == "div" and labelled and labelled[0] is not tensors[0]):
        return None
    found = walk.labels(activations[0]) if activations else None
    if found is not None and found.feeds is not None:
        return found.feeds
    parameters = [t for t in labelled if walk.name_of(t) is not None]
    return of_parameters(walk, parameters[0]) if parameters and name == "mul" else None


def together(walk: Walk, tensors: Sequence[Tensor]) -> tuple[Feed, ...] | None:
    """A factor of a sum, or of tensors side by side, goes into what feeds each of them."""
    found: dict[str, np.ndarray] = {}
    for t in tensors:
        labels = walk.labels(t)
        feeds = of_parameters(walk, t) if walk.name_of(t) is not None else labels.feeds if labels is not None else None
        mine = _rows(walk, Labels(labels.layers, feeds)) if labels is not None else {}
        if not mine:
            return None
        for name, rows in mine.items():
            found[name] = np.union1d(found[name], rows) if name in found else rows
    return tuple([Feed(name, rows) for name, rows in found.items()])


def _rows(walk: Walk, labels: Labels | None) -> dict[str, np.ndarray]:
    """Parameters that feed a tensor to their rows; empty where that isn't known."""
    if labels is None or not labels.feeds:
        return {}
    weight = labels.feeds[0].name
    named = np.unique(np.concatenate([x.reshape(-1) for x in labels.layers])) - walk.nodes.start.get((weight, 0), 0)
    if labels.feeds[0].rows is None and not (named[0] >= 0 and named[-1] < walk.nodes.shapes[weight][0]):
        return {}
    return {f.name: named.astype(np.int64) if f.rows is None else f.rows for f in labels.feeds}


def fix(walk: Walk, place: str, n: int, layer: Layer, q: Labels | None) -> None:
    """Note a softmax whose scale follows its ``n`` head dims.

    A scale that its module holds and doesn't use here follows as well: another attention processor may use it later.
    """
    term = ScaleTerm(place, n, layer, _rows(walk, q))
    walk.scales.append(term)
    for name, value in vars(walk.by_name[walk.module]).items():
        if type(value) is float and "scal" in name and math.isclose(value, n**-0.5, rel_tol=1e-9):
            walk.scale_attributes[walk.module, name] = term.first_row


def note_leaks(walk: Walk, name: str, tensors: Sequence[Tensor], kwargs: Any, out: Any) -> None:
    """Remember the operands whose feeds don't go on into the output."""
    if name.endswith("_like") or name.startswith("new_"):
        return
    if name.endswith("_as"):  # the second operand tells a dtype or shape
        tensors = tensors[:1]
    if name == "scaled_dot_product_attention" and kwargs.get("scale") is None:
        tensors = tensors[1:]  # the queries, whose factor is the point
    passed: set[str | None] = set()
    for t in walk.tensors(out):
        labels = walk.labels(t)
        passed |= {walk.name_of(t), *[f.name for f in (labels.feeds if labels is not None else None) or ()]}
    for t in tensors:
        labels = walk.labels(t)
        if labels is not None and walk.name_of(t) is not None:
            if walk.name_of(t) not in passed:
                walk.leaks.append(Labels(labels.layers, of_parameters(walk, t)))
        elif labels is not None and labels.feeds and not passed.issuperset([f.name for f in labels.feeds]):
            walk.leaks.append(labels)


def settle(walk: Walk) -> None:
    """Head dims stay where nothing that feeds the queries alone can take the factor."""
    leaked = {name: np.zeros(walk.nodes.shapes[name][0], bool) for s in walk.scales for name in s.targets}
    for labels in walk.leaks:
        names = [f.name for f in labels.feeds or () if f.name in leaked]
        rows = _rows(walk, labels) if names else {}
        for name in names:
            leaked[name][rows.get(name, ...)] = True
    kept = []
    for s in walk.scales:
        if s.targets and not any(leaked[name][rows].any() for name, rows in s.targets.items()):
            kept.append(s)
        else:
            walk.graph.freeze(s.layer, f"nothing that feeds q alone can take the softmax scale of {s.place}")
    walk.scales = kept
