"""Rules of what sends tokens to experts: which ones doesn't matter to channels, so a walk chooses some itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..constants import varying_shape
from ..labels import LabelMap, Labels
from .registry import Operation, rule


@rule("topk")
def topk(op: Operation, x: Tensor, k: int, dim: int = -1) -> Any:
    """The best k of a dim: of an activation they are made up, in turn, so that every expert gets its tokens."""
    walk, out = op.walk, op.run()
    if not x.is_meta:
        return out
    values, ids = out
    dim %= max(x.dim(), 1)
    walk.label(values, Labels(walk.graph.reduce(walk.maps(x), [dim], op.place, "is mixed by topk")))
    rows = ids.numel() // max(k, 1)
    chosen = (torch.arange(rows)[:, None] * k + torch.arange(k)) % x.shape[dim]
    shape = [n for d, n in enumerate(ids.shape) if d != dim]
    return values, chosen.reshape(*shape, k).movedim(-1, dim)


@rule("scatter_reduce", "scatter_reduce_", "scatter_add", "scatter_add_", "index_add", "index_add_", "index_copy",
      "index_copy_")  # fmt: skip
def scatter(op: Operation, x: Tensor, dim: int, index: Tensor, src: Any = None, source: Any = None) -> Any:
    """Entries are added or written at ids along a dim; along every other dim the two operands meet."""
    walk, values = op.walk, src if src is not None else source
    dim %= max(x.dim(), 1)
    if not walk.maps(x) or values is None or values.dim() != x.dim():
        return op.run_unknown()
    for t in (x, values):
        walk.freeze_dims(t, [dim], f"is picked apart by position in {op.place}")
    if index.dim() == x.dim():
        mixed = [d for d in range(x.dim()) if d != dim and not _constant_along(index, d)]
        walk.freeze_dims(x, mixed, f"is picked apart by position in {op.place}")
        walk.freeze_dims(values, mixed, f"is picked apart by position in {op.place}")
    out = op.run()

    def others(t: Tensor) -> tuple[tuple[LabelMap, ...], tuple[int, ...]]:
        shape = tuple([1 if d == dim else n for d, n in enumerate(varying_shape(t))])
        return tuple([y for y in walk.maps(t) if y.shape[dim] == 1]), shape

    maps = walk.graph.join(*others(x), *others(values), op.place)
    walk.label(x if op.func._schema.is_mutable else out, Labels(maps))
    return out


def _constant_along(index: Tensor, dim: int) -> bool:
    if index.shape[dim] == 1 or index.stride(dim) == 0:
        return True
    return not index.is_meta and bool((index == index.narrow(dim, 0, 1)).all())
