"""The softmax scale follows the head size: when head dims go, a factor must go into what feeds the queries alone.

A tensor's *fold targets* are the parameters that take a factor of it. They pass through what is linear; where a tensor
that has them is used in any other way, a factor in them would change more than the queries: then head dims stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from .labels import FoldTarget, LabelMap, Labels
from .notes import read_note
from .records import ScaleTerm
from .walk import Walk


def targets_of_projection(walk: Walk, weight: Tensor, bias: Tensor | None) -> tuple[FoldTarget, ...] | None:
    """A linear layer's output takes a factor through the rows of its weight and bias that its labels name."""
    names = [walk.name_of(p) for p in (weight, bias) if p is not None]
    return None if None in names else tuple([FoldTarget(n, None) for n in names if n is not None])


def targets_of_parameters(walk: Walk, *parameters: Tensor | None) -> tuple[FoldTarget, ...] | None:
    """What is multiplied by a parameter (and has others added) takes a factor through all of it."""
    names = [walk.name_of(p) for p in parameters if p is not None]
    if not names or None in names:
        return None
    return tuple([FoldTarget(n, _all_rows(walk.channels.shapes[n][0])) for n in names if n is not None])


@lru_cache(64)
def _all_rows(n: int) -> np.ndarray:
    rows = np.arange(n)
    rows.flags.writeable = False  # one for all
    return rows


def targets_of_elementwise(walk: Walk, name: str, args: Sequence[Any]) -> tuple[FoldTarget, ...] | None:
    """Sums take a factor through all their terms, products through one of theirs."""
    name = name.rstrip("_")
    tensors = [a for a in args if isinstance(a, Tensor)]
    if any(read_note(t).statistic is not None for t in tensors):  # a norm takes every factor out
        return None
    if name in ("add", "sub"):
        return targets_of_sum(walk, tensors) if len(tensors) == len(args) else None
    if name not in ("mul", "div"):
        return None
    labelled = [t for t in tensors if walk.labels(t) is not None]
    activations = [t for t in labelled if walk.name_of(t) is None]
    if len(activations) > 1 or (name == "div" and labelled and labelled[0] is not tensors[0]):
        return None
    found = walk.labels(activations[0]) if activations else None
    if found is not None and found.fold_targets is not None:
        return found.fold_targets
    parameters = [t for t in labelled if walk.name_of(t) is not None]
    return targets_of_parameters(walk, parameters[0]) if parameters and name == "mul" else None


def targets_of_sum(walk: Walk, tensors: Sequence[Tensor]) -> tuple[FoldTarget, ...] | None:
    """A factor of a sum, or of tensors side by side, goes into the fold targets of each of them."""
    found: dict[str, np.ndarray] = {}
    for t in tensors:
        mine = _target_rows(walk, _labels_with_targets(walk, t))
        if not mine:
            return None
        for name, rows in mine.items():
            found[name] = np.union1d(found[name], rows) if name in found else rows
    return tuple([FoldTarget(name, rows) for name, rows in found.items()])


def _labels_with_targets(walk: Walk, t: Tensor) -> Labels | None:
    """A tensor's labels; a parameter is its own fold target."""
    labels = walk.labels(t)
    return labels if labels is None or walk.name_of(t) is None else Labels(labels.maps, targets_of_parameters(walk, t))


def _target_rows(walk: Walk, labels: Labels | None) -> dict[str, np.ndarray]:
    """A tensor's fold targets to their rows; empty where they aren't known."""
    if labels is None or not labels.fold_targets:
        return {}
    first = labels.fold_targets[0]
    named = _ordered(labels.maps) - walk.channels.start.get((first.name, 0), 0)
    if first.rows is None and not (named[0] >= 0 and named[-1] < walk.channels.shapes[first.name][0]):
        return {}
    rows = named.astype(np.int64)
    return {t.name: rows if t.rows is None else t.rows for t in labels.fold_targets}


def _ordered(maps: Sequence[LabelMap]) -> np.ndarray:
    """All labels of the maps, each once, in order."""
    if len(maps) == 1:
        flat = maps[0].reshape(-1)
        if (flat[1:] > flat[:-1]).all():  # nearly always: sorting would be most of a walk's arithmetic
            return flat
    return np.unique(np.concatenate([x.reshape(-1) for x in maps]))


def note_softmax_scale(walk: Walk, place: str, n: int, label_map: LabelMap, q: Labels | None) -> None:
    """Note a softmax whose scale follows its ``n`` head dims.

    A scale that its module holds and doesn't use here follows as well: another attention processor may use it later.
    """
    term = ScaleTerm(place, n, label_map, _target_rows(walk, q))
    walk.scales.append(term)
    for name, value in vars(walk.by_name[walk.module]).items():
        if type(value) is float and "scal" in name and math.isclose(value, n**-0.5, rel_tol=1e-9):
            walk.scale_attributes[walk.module, name] = term.first_row


def note_other_uses(walk: Walk, name: str, tensors: Sequence[Tensor], kwargs: Any, out: Any) -> None:
    """Remember the operands whose fold targets don't go on into the output."""
    if name.endswith("_like") or name.startswith("new_"):
        return
    if name.endswith("_as"):  # the second operand tells a dtype or shape
        tensors = tensors[:1]
    if name == "scaled_dot_product_attention" and kwargs.get("scale") is None:
        tensors = tensors[1:]  # the queries, whose factor is the point
    notes = [(t, note) for t in tensors if (note := read_note(t)).parameter is not None or _takes_factor(note.labels)]
    if not notes:
        return
    passed: set[str | None] = set()
    for t in walk.tensors(out):
        note = read_note(t)
        passed.add(note.parameter)
        if note.labels is not None:
            passed.update([target.name for target in note.labels.fold_targets or ()])
    for t, note in notes:
        if note.parameter is not None and note.parameter not in passed and not name.startswith("_weight_norm"):
            walk.read.add(note.parameter)
        if note.labels is None:
            continue
        if note.parameter is not None:
            if note.parameter not in passed:
                walk.other_uses.append(Labels(note.labels.maps, targets_of_parameters(walk, t)))
        elif note.labels.fold_targets and not passed.issuperset([x.name for x in note.labels.fold_targets]):
            walk.other_uses.append(note.labels)


def _takes_factor(labels: Labels | None) -> bool:
    return labels is not None and bool(labels.fold_targets)


def freeze_unfoldable_heads(walk: Walk) -> None:
    """Head dims stay where nothing that feeds the queries alone can take the factor."""
    used = {name: np.zeros(walk.channels.shapes[name][0], bool) for s in walk.scales for name in s.targets}
    for labels in walk.other_uses:
        names = [target.name for target in labels.fold_targets or () if target.name in used]
        rows = _target_rows(walk, labels) if names else {}
        for name in names:
            used[name][rows.get(name, ...)] = True
    kept = []
    for s in walk.scales:
        if s.targets and not any(used[name][rows].any() for name, rows in s.targets.items()):
            kept.append(s)
        else:
            walk.graph.freeze(s.label_map, f"nothing that feeds q alone can take the softmax scale of {s.place}")
    walk.scales = kept
