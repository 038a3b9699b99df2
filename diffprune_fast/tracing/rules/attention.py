"""Rules of attention products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..labels import LabelMap, Labels, varying
from ..scale_folding import note_softmax_scale
from ..walk import Walk
from .contractions import contract, insert_dim
from .movement import repeat_entries
from .registry import Operation, align, empty_output, pad_shape, rule


@rule("scaled_dot_product_attention")
def scaled_dot_product_attention(
    op: Operation,
    q: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """q and k go together per (head, dim); v goes with the output; every head keeps equally many of each."""
    walk, place, k, v = op.walk, op.place, key, value
    if enable_gqa and k.dim() > 2 and q.shape[-3] != k.shape[-3]:
        k, v = (repeat_entries(walk, t, q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    if q.shape[:-2] != k.shape[:-2] or k.shape[:-2] != v.shape[:-2]:
        return op.run_unknown()
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        return op.run()  # raises PyTorch's own error
    out = empty_output((*q.shape[:-1], v.shape[-1]), q)
    walk.attend(q, k, v)
    value_maps = walk.maps(v)
    batch = tuple(q.shape[:-2])
    n_q, n_k = q.shape[-2], k.shape[-2]
    queries, keys = insert_dim(walk.maps(q), -2), insert_dim(walk.maps(k), -3)
    scores, dims = contract(
        op, queries, (*batch, n_q, 1, q.shape[-1]), keys, (*batch, 1, n_k, k.shape[-1]), attention=True
    )
    if attn_mask is not None:
        mask = align(walk.maps(attn_mask), q.dim())
        scores = walk.graph.join(scores, (*batch, n_q, n_k), mask, pad_shape(attn_mask.shape, q.dim()), place)
    scores = walk.graph.reduce(scores, [len(batch) + 1], place, "is mixed by softmax")
    head_dims = [x for x in dims if varying(x)[-1] == x.ndim - 1]
    value_dims = [x for x in value_maps if x.shape[-1] > 1]
    _constrain_heads(walk, place, q.shape[-1], v.shape[-1], head_dims, value_dims)
    if scale is None and head_dims:
        note_softmax_scale(walk, place, q.shape[-1], head_dims[0], walk.labels(q))
    values = insert_dim(tuple([np.swapaxes(x, -1, -2) for x in value_maps]), -3)
    left, _ = contract(
        op, insert_dim(scores, -2), (*batch, n_q, 1, n_k), values, (*batch, 1, v.shape[-1], n_k), attention=True
    )
    walk.label(out, Labels(left))
    return out


def _constrain_heads(
    walk: Walk, place: str, n_qk: int, n_v: int, qk: Sequence[LabelMap], v: Sequence[LabelMap]
) -> None:
    """Equal counts in every head; and q/k as many as v, since most code views v with k's head size."""
    rows = [x.reshape(-1, x.shape[-1]) for x in (*qk[:1], *v[:1])]
    if not rows:
        return
    if n_qk == n_v:
        if len(rows) == 1:
            rows.append(np.zeros((1, n_qk), np.int32))
        walk.graph.constrain("heads", place, np.concatenate(rows))
    else:
        for r in rows:
            walk.graph.constrain("heads", place, r)
