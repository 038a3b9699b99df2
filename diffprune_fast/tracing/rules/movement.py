"""Rules of ops that move elements: whatever they do to a tensor, they do to its labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..constants import is_diagonal, varying_shape
from ..labels import LabelMap, LabelMaps, Labels, compress, varying
from ..scale_folding import targets_of_sum
from ..walk import Walk
from .registry import Operation, align, apply_rule, dims_of, each, empty_output, pad_shape, rule, rule_of_first

aten = torch.ops.aten


def _blocks(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """The runs of dims that a reshape keeps apart: those of equal products, one after the other."""
    i = j = 0
    while i < len(before) or j < len(after):
        k, m = min(i + 1, len(before)), j
        while math.prod(before[i:k]) != math.prod(after[j:m]) and (k < len(before) or m < len(after)):
            if m < len(after) and (math.prod(after[j:m]) < math.prod(before[i:k]) or k == len(before)):
                m += 1
            else:
                k += 1
        if k == len(before):
            m = len(after)
        yield slice(i, k), slice(j, m)
        i, j = k, m


def _reshape_map(label_map: LabelMap, before: Sequence[int], after: Sequence[int]) -> LabelMap | None:
    """A label_map after a reshape, without the dims on which it doesn't depend (tokens, pixels: most of the size)."""
    small_before, small_after = list(before), list(after)
    for mine, theirs in _blocks(before, after):
        if all(n == 1 for n in label_map.shape[mine]):
            small_before[mine] = [1] * (mine.stop - mine.start)
            small_after[theirs] = [1] * (theirs.stop - theirs.start)
    return compress(np.broadcast_to(label_map, small_before).reshape(small_after), label_map.size)


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "_reshape_alias", "view_as", "reshape_as")
def reshape(op: Operation, x: Tensor) -> Any:
    out, labels = op.run(), op.walk.labels(x)
    if labels is None:
        return out
    if out.numel() != x.numel():  # view(dtype)
        op.freeze_operands()
        return out
    maps = []
    for label_map in labels.maps:
        after = _reshape_map(label_map, x.shape, out.shape)
        if after is not None:
            after = op.walk.graph.follow_reshape(
                label_map, op.walk.keep_heads_whole(label_map, after, op.place), op.place
            )
        if after is not None:
            maps.append(after)
    op.walk.label(out, Labels(tuple(maps), labels.fold_targets, zero=labels.zero))
    return out


@rule("transpose", "permute", "t", "numpy_T", "mT", "movedim", "moveaxis", "swapaxes", "unsqueeze", "squeeze", "expand",
      "repeat", "repeat_interleave", "tile", "broadcast_to", "unsqueeze_", "squeeze_", "transpose_", "t_")  # fmt: skip
def move(op: Operation, x: Tensor) -> Any:
    """Ops that only move elements run on the labels as they are."""
    if op.name == "repeat_interleave" and len(op.args) > 2 and isinstance(op.args[1], Tensor):
        return _repeat_by_counts(op, *op.args[:3])
    before, labels = x.shape, op.walk.labels(x)
    out = op.run()
    if labels is None:
        return out
    maps: list[list[np.ndarray]] = [[] for _ in each(out)]
    call = op.walk.functional(op.func)
    for label_map in labels.maps:
        full = torch.from_numpy(np.array(label_map)).expand(before)  # a copy: broadcast labels aren't writable
        for mine, moved in zip(maps, each(call(full, *op.args[1:], **op.kwargs))):
            after = compress(moved.numpy(), label_map.size)
            if after is not None:
                mine.append(after)
    for o, mine in zip(each(out), maps):
        op.walk.label(o, Labels(tuple(mine), labels.fold_targets, zero=labels.zero))
    return out


def _repeat_by_counts(op: Operation, x: Tensor, repeats: Tensor, dim: int) -> Any:
    """Every entry of a dim as often as its own count says."""
    if repeats.is_meta:
        return op.run_unknown()
    return apply_rule(op.walk, aten.index_select.default, (x, dim, torch.repeat_interleave(repeats)))


@rule("select", "unbind", "slice", "narrow")
def pick(
    op: Operation, x: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    """Channels that are picked by their position stay; whole rows of channels may be, as rows stay anyway."""
    dim %= x.dim()
    if op.name != "slice" or start or (end is not None and end < x.shape[dim]) or step != 1:
        for label_map in op.walk.maps(x):
            if label_map.shape[dim] > 1 and varying(label_map)[-1] == dim:
                op.walk.graph.freeze(label_map, f"is picked apart by position in {op.place}")
    return move(op, x)


@rule("roll", "flip")
def reorder(op: Operation, x: Tensor, dims: Any = None) -> Any:
    op.walk.freeze_dims(x, dims_of(dims, x.dim()), f"is reordered in {op.place}")
    return move(op, x)


def repeat_entries(walk: Walk, x: Tensor, times: int, dim: int) -> Tensor:
    """Every entry of a dim several times over, as grouped-query attention has its keys and values."""
    return apply_rule(walk, aten.repeat_interleave.self_int, (x, times, dim))


@rule_of_first("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
def split(op: Operation, x: Tensor, labels: Labels, out: Any, dim: int = 0) -> Any:
    """Pieces of a labelled dim: all equal, so that they stay equal, or else the dim stays whole."""
    dim %= x.dim()
    stops = np.cumsum([o.shape[dim] for o in out])[:-1]
    pieces: list[list[np.ndarray]] = [[] for _ in out]
    for label_map in labels.maps:
        if label_map.shape[dim] == 1:
            parts = [label_map] * len(out)
        else:
            parts = np.split(label_map, stops, axis=dim)
            if varying(label_map)[-1] != dim:
                pass  # whole rows, which stay
            elif len({p.shape[dim] for p in parts}) > 1:
                op.walk.graph.freeze(label_map, f"is split into unequal pieces in {op.place}")
            elif len(parts) > 1:
                rows = np.stack([np.moveaxis(p, dim, -1) for p in parts]).reshape(-1, parts[0].shape[dim])
                op.walk.graph.constrain("chunk", op.place, rows)
        for piece, part in zip(pieces, parts):
            if part.size > 1:
                piece.append(part)
    for o, piece in zip(out, pieces):
        op.walk.label(o, Labels(tuple(piece), labels.fold_targets, zero=labels.zero))
    return out


@rule_of_first("index_select")
def index_select(op: Operation, x: Tensor, labels: Labels, out: Tensor, dim: int) -> Any:
    """Positions chosen by constants: what was there must stay there."""
    op.walk.freeze_dims(x, [dim % x.dim()], f"is picked apart by position in {op.place}")
    op.walk.label(out, Labels(tuple([y for y in labels.maps if y.shape[dim] == 1]), labels.fold_targets))
    return out


@rule("index")
def index(op: Operation, x: Tensor, indices: Sequence[Tensor | None]) -> Any:
    """Entries by ids: the channels along every other dim are what they were."""
    ids = [i for a in indices for i in (a.nonzero(as_tuple=True) if a is not None and _is_mask(a) else (a,))]
    out = op.walk.run(op.func, (x, ids), op.kwargs)
    labels = op.walk.labels(x)
    if labels is None:
        return out
    picked = [d for d, i in enumerate(ids) if i is not None]
    op.walk.freeze_dims(x, picked, f"is picked apart by position in {op.place}")
    first = [None if i is None else torch.zeros((1,) * i.dim(), dtype=torch.long) for i in ids]
    kept = [y for y in labels.maps if not any(y.shape[d] > 1 for d in picked)]
    maps = [aten.index(torch.from_numpy(np.array(y)), first).numpy() for y in kept]
    op.walk.label(out, Labels(tuple(maps), labels.fold_targets))
    return out


@rule("index_put_", "index_put")
def index_put(op: Operation, x: Tensor, indices: Sequence[Tensor | None], values: Tensor) -> Any:
    """Entries written at ids: along every other dim they meet those that are there."""
    walk, place = op.walk, op.place
    if is_diagonal(x):
        for label_map in walk.maps(values):
            walk.graph.freeze(label_map, f"is a kernel position of {place}")
        return op.run()
    masked = [i for i in indices if i is not None and i.dtype == torch.bool]
    if not walk.maps(x) or any(i.is_meta for i in masked):
        return op.run_unknown()
    ids = [i for a in indices for i in (a.nonzero(as_tuple=True) if a is not None and _is_mask(a) else (a,))]
    picked = [d for d, i in enumerate(ids) if i is not None]
    first, last = picked[0], picked[-1] + 1
    if last - first > len(picked):
        return op.run_unknown()
    n = max(i.dim() for i in ids if i is not None)
    out = walk.run(op.func, (x, ids, *op.args[2:]), op.kwargs)
    ndim = x.dim() - len(picked) + n
    theirs, size = align(walk.maps(values), ndim), pad_shape(varying_shape(values), ndim)
    why = f"is picked apart by position in {place}"
    walk.freeze_dims(x, picked, why)
    for label_map in theirs:
        if any(label_map.shape[d] > 1 for d in range(first, first + n)):
            walk.graph.freeze(label_map, why)

    def around(shape: Sequence[int], start: int, stop: int, ones: int) -> tuple[int, ...]:
        return (*shape[:start], *(1,) * ones, *shape[stop:])

    mine = tuple([y.reshape(around(y.shape, first, last, n)) for y in walk.maps(x) if max(y.shape[first:last]) == 1])
    theirs = tuple([y for y in theirs if max(y.shape[first : first + n], default=1) == 1])
    size = around(size, first, first + n, n)
    maps = walk.graph.join(mine, around(x.shape, first, last, n), theirs, size, place)
    kept = tuple([y.reshape(around(y.shape, first, first + n, len(picked))) for y in maps])
    walk.label(x if op.func._schema.is_mutable else out, Labels(kept))
    return out


def _is_mask(ids: Tensor) -> bool:
    return ids.dtype == torch.bool and ids.device.type != "meta"


def _side_by_side(tensors: Sequence[Tensor], dim: int) -> Tensor | None:
    """The output of cat where all operands are on meta and alike but for the dim; None: it has to be run."""
    if not tensors or not all(t.is_meta and t.dtype == tensors[0].dtype for t in tensors):
        return None
    shapes = [list(t.shape) for t in tensors]
    if any(len(s) != len(shapes[0]) for s in shapes) or not -len(shapes[0]) <= dim < len(shapes[0]):
        return None
    shape = [*shapes[0]]
    shape[dim] = sum([s.pop(dim) for s in shapes])
    return empty_output(shape, tensors[0]) if all(s == shapes[0] for s in shapes) else None


@rule("cat", "concat", "concatenate")
def cat(op: Operation, operands: Sequence[Tensor], dim: int = 0) -> Any:
    """Labels side by side along the dim; along every other dim they meet."""
    walk, tensors = op.walk, [t for t in operands if t.dim() > 1 or t.numel()]
    out = _side_by_side(tensors, dim)
    if out is None:
        out = op.run()
    dim %= out.dim()
    along: dict[tuple[int, ...], list[np.ndarray | None]] = {}
    across: list[tuple[LabelMaps, Sequence[int]]] = []
    for i, t in enumerate(tensors):
        for x in walk.maps(t):
            if x.shape[dim] > 1:
                others = tuple(n if d != dim else -1 for d, n in enumerate(x.shape))
                along.setdefault(others, [None] * len(tensors))[i] = x
        shape = tuple([1 if d == dim else n for d, n in enumerate(varying_shape(t))])
        across.append((tuple([x for x in walk.maps(t) if x.shape[dim] == 1]), shape))
    maps = walk.graph.join_all(across, out.dim(), op.place)
    joined = []
    for others, parts in along.items():
        full = [
            np.zeros([t.shape[dim] if n == -1 else n for n in others], np.int32) if x is None else x
            for t, x in zip(tensors, parts)
        ]
        joined.append(np.concatenate(full, axis=dim))
    for label_map in joined:
        if len(varying(label_map)) > 1:
            rows = np.moveaxis(label_map, dim, -1).reshape(-1, label_map.shape[dim])
            walk.graph.constrain("view", op.place, rows)
    walk.label(out, Labels((*maps, *joined), targets_of_sum(walk, tensors)))
    return out


@rule("pad_sequence")
def pad_sequence(op: Operation, sequences: Sequence[Tensor]) -> Any:
    """Sequences side by side, filled up with one number; along every other dim they meet."""
    walk, out = op.walk, op.run()
    across: list[tuple[LabelMaps, Sequence[int]]] = []
    for t in sequences:
        walk.freeze_dims(t, [0], f"is filled up in {op.place}")
        across.append((tuple([x[None] for x in walk.maps(t) if x.shape[0] == 1]), (1, 1, *varying_shape(t)[1:])))
    walk.label(out, Labels(walk.graph.join_all(across, out.dim(), op.place)))
    return out


@rule("stack")
def stack(op: Operation, tensors: Sequence[Tensor], dim: int = 0) -> Any:
    raised = [apply_rule(op.walk, aten.unsqueeze.default, (t, dim)) for t in tensors]
    return apply_rule(op.walk, aten.cat.default, (raised, dim))


@rule("channel_shuffle")
def channel_shuffle(op: Operation, x: Tensor, groups: int) -> Any:
    rows = [x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]]
    y = apply_rule(op.walk, aten.view.default, (x, rows))
    y = apply_rule(op.walk, aten.transpose.int, (y, 1, 2))
    return apply_rule(op.walk, aten.reshape.default, (y, list(x.shape)))


@rule_of_first("pixel_shuffle")
def pixel_shuffle(op: Operation, x: Tensor, labels: Labels, out: Tensor, upscale_factor: int) -> Any:
    """The r*r channels of one output channel go together: pixels can't be removed one by one."""
    r, dim = upscale_factor, x.dim() - 3
    kept = []
    for label_map in labels.maps:
        if label_map.shape[dim] == 1:
            kept.append(label_map)
            continue
        last = np.moveaxis(label_map, dim, -1)
        blocks = last.reshape(*last.shape[:-1], -1, r * r)
        op.walk.graph.link(blocks[..., :1], blocks, op.place)
        first = np.moveaxis(blocks[..., 0], -1, dim)
        if first.size > 1:
            kept.append(first)
    op.walk.label(out, Labels(tuple(kept)))
    return out


@rule_of_first("pixel_unshuffle")
def pixel_unshuffle(op: Operation, x: Tensor, labels: Labels, out: Tensor, downscale_factor: int) -> Any:
    maps = [np.repeat(y, downscale_factor * downscale_factor, axis=x.dim() - 3) for y in labels.maps]
    op.walk.label(out, Labels(tuple(maps)))
    return out


@rule_of_first("view_as_complex", "view_as_real")
def complex_pairs(op: Operation, x: Tensor, labels: Labels, out: Tensor) -> Any:
    """The last dim of a real tensor is a complex number's two parts: no channels, or they stay."""
    if op.name == "view_as_complex":
        op.walk.freeze_dims(x, [x.dim() - 1], f"is half of a complex number in {op.place}")
        kept = tuple([y[..., 0] for y in labels.maps if y.shape[-1] == 1])
    else:
        kept = tuple([y[..., None] for y in labels.maps])
    op.walk.label(out, Labels(kept, labels.fold_targets))
    return out
