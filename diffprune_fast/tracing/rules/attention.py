"""Rules of attention products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..labels import Labels, Layer, varying
from ..scale_folding import fix
from .contractions import _insert, _layers, contract
from .movement import repeated
from .registry import aligned, padded, rule, shell, unknown

if TYPE_CHECKING:
    from ..walk import Walk


@rule("scaled_dot_product_attention")
def scaled_dot_product_attention(walk: Walk, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """q and k go together per (head, dim); v goes with the output; every head keeps equally many of each."""
    named = {**dict(zip([a.name for a in func._schema.arguments], args)), **kwargs}
    q, k, v, mask = named["query"], named["key"], named["value"], named.get("attn_mask")
    place = walk.place(func)
    if named.get("enable_gqa") and k.dim() > 2 and q.shape[-3] != k.shape[-3]:
        k, v = (repeated(walk, t, q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    if q.shape[:-2] != k.shape[:-2] or k.shape[:-2] != v.shape[:-2]:
        return unknown(walk, func, args, kwargs)
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        return walk.run(func, args, kwargs)  # raises PyTorch's own error
    out = shell((*q.shape[:-1], v.shape[-1]), q)
    walk.attend(q, k, v)
    lq, lk, lv = _layers(walk, q), _layers(walk, k), _layers(walk, v)
    batch = tuple(q.shape[:-2])
    n_q, n_k = q.shape[-2], k.shape[-2]
    scores, dims = contract(
        walk, func, _insert(lq, -2), (*batch, n_q, 1, q.shape[-1]), _insert(lk, -3), (*batch, 1, n_k, k.shape[-1]), True
    )
    if mask is not None:
        scores = walk.graph.meet(
            scores, (*batch, n_q, n_k), aligned(_layers(walk, mask), q.dim()), padded(mask.shape, q.dim()), place
        )
    scores = walk.graph.reduce(scores, [len(batch) + 1], place, "is mixed by softmax")
    head_dims = [x for x in dims if varying(x)[-1] == x.ndim - 1]
    value_dims = [x for x in lv if x.shape[-1] > 1]
    _head_rows(walk, place, q.shape[-1], v.shape[-1], head_dims, value_dims)
    if named.get("scale") is None and head_dims:
        fix(walk, place, q.shape[-1], head_dims[0], walk.labels(q))
    values = tuple([np.swapaxes(x, -1, -2) for x in lv])
    left, _ = contract(
        walk, func, _insert(scores, -2), (*batch, n_q, 1, n_k), _insert(values, -3), (*batch, 1, v.shape[-1], n_k), True
    )
    walk.label(out, Labels(left))
    return out


def _head_rows(walk: Walk, place: str, n_qk: int, n_v: int, qk: Sequence[Layer], v: Sequence[Layer]) -> None:
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
