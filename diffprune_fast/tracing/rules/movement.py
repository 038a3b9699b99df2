"""Rules of ops that move elements: whatever they do to a tensor, they do to its labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..constants import spread
from ..labels import Labels, Layer, Layers, compress, varying
from ..scale_folding import together
from .registry import dims_of, rule, rule_of_first, unknown

if TYPE_CHECKING:
    from ..walk import Walk


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


def _reshaped(layer: Layer, before: Sequence[int], after: Sequence[int]) -> Layer | None:
    """A layer after a reshape, without the dims on which it doesn't depend (tokens, pixels: most of the size)."""
    small_before, small_after = list(before), list(after)
    for mine, theirs in _blocks(before, after):
        if all(n == 1 for n in layer.shape[mine]):
            small_before[mine] = [1] * (mine.stop - mine.start)
            small_after[theirs] = [1] * (theirs.stop - theirs.start)
    return compress(np.broadcast_to(layer, small_before).reshape(small_after), layer.size)


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "_reshape_alias", "view_as", "reshape_as")
def reshape(walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    out = walk.run(func, args, kwargs)
    if out.numel() != x.numel():  # view(dtype)
        return unknown(walk, func, args, kwargs)
    labels = walk.labels(x)
    if labels is None:
        return out
    place = walk.place(func)
    moved = []
    for layer in labels.layers:
        after = _reshaped(layer, x.shape, out.shape)
        if after is not None:
            after = walk.graph.moved(layer, walk.regrouped(layer, after, place), place)
        if after is not None:
            moved.append(after)
    walk.label(out, Labels(tuple(moved), labels.feeds))
    return out


@rule("transpose", "permute", "t", "numpy_T", "mT", "movedim", "moveaxis", "swapaxes", "unsqueeze", "squeeze", "expand",
      "select", "unbind", "slice", "narrow", "repeat", "repeat_interleave", "tile", "roll", "flip", "broadcast_to",
      "unsqueeze_", "squeeze_", "transpose_", "t_")  # fmt: skip
def move(walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Ops that only move elements run on the labels as they are."""
    x = args[0]
    if walk.labels(x) is None:
        return walk.run(func, args, kwargs)
    name = func.overloadpacket.__name__
    if name in ("select", "unbind", "slice", "narrow"):
        _freeze_picked(walk, func, args, kwargs)
    if name in ("roll", "flip"):
        dims = dims_of(args[2] if name == "roll" and len(args) > 2 else args[1] if name == "flip" else None, x.dim())
        walk.graph_freeze(x, dims, f"is reordered in {walk.place(func)}")
    before = tuple(x.shape)
    out = walk.run(func, args, kwargs)
    labels = walk.labels(x)
    assert labels is not None
    outs = out if isinstance(out, (tuple, list)) else (out,)
    moved: list[list[np.ndarray]] = [[] for _ in outs]
    call = walk.functional(func)
    for layer in labels.layers:
        full = torch.from_numpy(np.array(layer)).expand(before)  # a copy: broadcast labels aren't writable
        res = call(full, *args[1:], **kwargs)
        for i, r in enumerate(res if isinstance(res, (tuple, list)) else (res,)):
            after = compress(r.numpy(), layer.size)
            if after is not None:
                moved[i].append(after)
    for o, m in zip(outs, moved):
        walk.label(o, Labels(tuple(m), labels.feeds))
    return out


def repeated(walk: Walk, x: Tensor, times: int, dim: int) -> Tensor:
    """Every entry of a dim several times over, as grouped-query attention has its keys and values."""
    return move(walk, torch.ops.aten.repeat_interleave.self_int, (x, times, dim), {})


@rule_of_first("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
def split(walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, labels: Labels) -> Any:
    """Pieces of a labelled dim: all equal, so that they stay equal, or else the dim stays whole."""
    x = args[0]
    dim = (kwargs.get("dim", args[2] if len(args) > 2 else 0)) % x.dim()
    stops = np.cumsum([o.shape[dim] for o in out])[:-1]
    pieces: list[list[np.ndarray]] = [[] for _ in out]
    for layer in labels.layers:
        if layer.shape[dim] == 1:
            parts = [layer] * len(out)
        else:
            parts = np.split(layer, stops, axis=dim)
            if varying(layer)[-1] != dim:
                pass  # whole rows, which stay
            elif len({p.shape[dim] for p in parts}) > 1:
                walk.graph.freeze(layer, f"is split into unequal pieces in {walk.place(func)}")
            elif len(parts) > 1:
                rows = np.stack([np.moveaxis(p, dim, -1) for p in parts]).reshape(-1, parts[0].shape[dim])
                walk.graph.constrain("chunk", walk.place(func), rows)
        for piece, part in zip(pieces, parts):
            if part.size > 1:
                piece.append(part)
    for o, piece in zip(out, pieces):
        walk.label(o, Labels(tuple(piece), labels.feeds))
    return out


def _freeze_picked(walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Channels that are picked by their position stay; whole rows of channels may be, as rows stay anyway."""
    x = args[0]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % x.dim()
    if func.overloadpacket.__name__ == "slice":
        start, stop, step = (*args[2:], *(None, None, None))[:3]
        if start in (None, 0) and (stop is None or stop >= x.shape[dim]) and step in (None, 1):
            return
    labels = walk.labels(x)
    for layer in labels.layers if labels is not None else ():
        if layer.shape[dim] > 1 and varying(layer)[-1] == dim:
            walk.graph.freeze(layer, f"is picked apart by position in {walk.place(func)}")


@rule_of_first("index_select")
def index_select(walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, labels: Labels) -> Any:
    """Positions chosen by constants: what was there must stay there."""
    x = args[0]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % x.dim()
    walk.graph_freeze(x, [dim], f"is picked apart by position in {walk.place(func)}")
    walk.label(out, Labels(tuple([y for y in labels.layers if y.shape[dim] == 1]), labels.feeds))
    return out


@rule("index")
def index(walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Entries by ids: the channels along every other dim are what they were."""
    x, ids = args
    ids = [i for a in ids for i in (a.nonzero(as_tuple=True) if _is_mask(a) else (a,))]
    out = walk.run(func, (x, ids), kwargs)
    labels = walk.labels(x)
    if labels is None:
        return out
    picked = [d for d, i in enumerate(ids) if i is not None]
    walk.graph_freeze(x, picked, f"is picked apart by position in {walk.place(func)}")
    first = [None if i is None else torch.zeros((1,) * i.dim(), dtype=torch.long) for i in ids]
    kept = [y for y in labels.layers if not any(y.shape[d] > 1 for d in picked)]
    moved = [torch.ops.aten.index(torch.from_numpy(np.array(y)), first).numpy() for y in kept]
    walk.label(out, Labels(tuple(moved), labels.feeds))
    return out


def _is_mask(ids: Tensor | None) -> bool:
    return ids is not None and ids.dtype == torch.bool and ids.device.type != "meta"


@rule("cat", "concat", "concatenate")
def cat(walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Labels side by side along the dim; along every other dim they meet."""
    tensors = [t for t in args[0] if t.dim() > 1 or t.numel()]
    out = walk.run(func, args, kwargs)
    dim = (kwargs.get("dim", args[1] if len(args) > 1 else 0)) % out.dim()
    along: dict[tuple[int, ...], list[np.ndarray | None]] = {}
    across: list[tuple[Layers, Sequence[int]]] = []
    for i, t in enumerate(tensors):
        labels = walk.labels(t)
        mine = labels.layers if labels is not None else ()
        for x in mine:
            if x.shape[dim] > 1:
                others = tuple(n if d != dim else -1 for d, n in enumerate(x.shape))
                along.setdefault(others, [None] * len(tensors))[i] = x
        shape = tuple([1 if d == dim else n for d, n in enumerate(spread(walk, t))])
        across.append((tuple([x for x in mine if x.shape[dim] == 1]), shape))
    layers = walk.graph.meet_all(across, out.dim(), walk.place(func))
    joined = []
    for others, parts in along.items():
        full = [
            np.zeros([t.shape[dim] if n == -1 else n for n in others], np.int32) if x is None else x
            for t, x in zip(tensors, parts)
        ]
        joined.append(np.concatenate(full, axis=dim))
    for layer in joined:
        if len(varying(layer)) > 1:
            walk.graph.constrain("view", walk.place(func), np.moveaxis(layer, dim, -1).reshape(-1, layer.shape[dim]))
    walk.label(out, Labels((*layers, *joined), together(walk, tensors)))
    return out


@rule("pad_sequence")
def pad_sequence(walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Sequences side by side, filled up with one number; along every other dim they meet."""
    out = walk.run(func, args, kwargs)
    across: list[tuple[Layers, Sequence[int]]] = []
    for t in args[0]:
        walk.graph_freeze(t, [0], f"is filled up in {walk.place(func)}")
        labels = walk.labels(t)
        mine = labels.layers if labels is not None else ()
        across.append((tuple([x[None] for x in mine if x.shape[0] == 1]), (1, 1, *spread(walk, t)[1:])))
    walk.label(out, Labels(walk.graph.meet_all(across, out.dim(), walk.place(func))))
    return out


@rule("stack")
def stack(walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    raised = [move(walk, torch.ops.aten.unsqueeze.default, (t, dim), {}) for t in args[0]]
    return cat(walk, torch.ops.aten.cat.default, (raised, dim), {})


@rule("channel_shuffle")
def channel_shuffle(walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, groups = args
    ops = torch.ops.aten
    shape = tuple(x.shape)
    y = reshape(walk, ops.view.default, (x, [shape[0], groups, shape[1] // groups, *shape[2:]]), {})
    y = move(walk, ops.transpose.int, (y, 1, 2), {})
    return reshape(walk, ops.reshape.default, (y, list(shape)), {})


@rule_of_first("pixel_shuffle")
def pixel_shuffle(
    walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, labels: Labels
) -> Any:
    """The r*r channels of one output channel go together: pixels can't be removed one by one."""
    x, r = args
    dim = x.dim() - 3
    kept = []
    for layer in labels.layers:
        if layer.shape[dim] == 1:
            kept.append(layer)
            continue
        blocks = np.moveaxis(layer, dim, -1).reshape(-1, layer.shape[dim] // (r * r), r * r)
        walk.graph.link(blocks[..., :1], blocks, walk.place(func))
        shape = list(layer.shape)
        shape[dim] //= r * r
        first = np.moveaxis(layer, dim, -1).reshape(*[n for d, n in enumerate(layer.shape) if d != dim], -1, r * r)
        first = np.moveaxis(first[..., 0], -1, dim)
        if first.size > 1:
            kept.append(first)
    walk.label(out, Labels(tuple(kept)))
    return out


@rule_of_first("pixel_unshuffle")
def pixel_unshuffle(
    walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, labels: Labels
) -> Any:
    x, r = args
    walk.label(out, Labels(tuple([np.repeat(y, r * r, axis=x.dim() - 3) for y in labels.layers])))
    return out


@rule_of_first("view_as_complex", "view_as_real")
def complex_pairs(
    walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, labels: Labels
) -> Any:
    """The last dim of a real tensor is a complex number's two parts: no channels, or they stay."""
    if func.overloadpacket.__name__ == "view_as_complex":
        walk.graph_freeze(args[0], [args[0].dim() - 1], f"is half of a complex number in {walk.place(func)}")
        kept = tuple([x[..., 0] for x in labels.layers if x.shape[-1] == 1])
    else:
        kept = tuple([x[..., None] for x in labels.layers])
    walk.label(out, Labels(kept, labels.feeds))
    return out
