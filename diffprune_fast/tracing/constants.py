"""Tensors that a forward makes of nothing but numbers: where they are the same in every channel, any channels may go.

What was made in one call and all its views share a :class:`Content`, because a write into one of them is one into all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .notes import Content, read_note

_MADE = {
    **dict.fromkeys(("zeros", "new_zeros", "zeros_like"), "zero"),
    **dict.fromkeys(("ones", "new_ones", "ones_like", "full", "new_full", "full_like"), "uniform"),
    "arange": "ids",
}


_VIEWS = "alias detach view reshape expand unsqueeze squeeze slice select unbind transpose permute t contiguous to"


_IS_VIEW = frozenset(_VIEWS.split())


def _kind(t: Any) -> str:
    content = read_note(t).content
    return content.kind if content is not None else ""


def content_of_output(func: Any, args: Any, tensors: Sequence[Tensor]) -> Content | None:
    """Look at an op's operands before it runs; what its output shares with them, or is made of."""
    name = func.overloadpacket.__name__
    if name in _MADE:
        return Content(_MADE[name]) if name != "arange" or len(args) == 1 else None
    known = [content for t in tensors if (content := read_note(t).content) is not None]
    if not known:
        return None
    first = read_note(args[0]).content
    view = any(r.alias_info is not None for r in func._schema.returns)
    if view and not func._schema.is_mutable and name in _IS_VIEW and _kind(args[0]) in ("zero", "uniform"):
        return first
    diagonal = name == "index_put_" and _kind(args[0]) == "zero" and _fills_diagonal(*args[:3])
    if view:  # a write, or an alias that may be written to
        for content in known:
            if content.kind != "ids" or content is first:
                content.kind, content.diagonal = "written", None
    if diagonal and first is not None:
        first.diagonal = id(args[0])
    return None


def _fills_diagonal(x: Tensor, ids: Sequence[Tensor | None], values: Tensor) -> bool:
    """Whether ``x[ids] = values`` writes the same along all of a square matrix's diagonal."""
    if len(ids) != 2 or ids[0] is not ids[1] or _kind(ids[0]) != "ids":
        return False
    alike = values.dim() < x.dim() - 1 or values.shape[0] == 1 or values.stride(0) == 0
    return alike and ids[0] is not None and x.shape[0] == x.shape[1] == ids[0].shape[0]


def is_diagonal(t: Tensor) -> bool:
    """A matrix with the same kernel all along its diagonal: every channel goes through it by itself."""
    content = read_note(t).content
    return content is not None and content.diagonal == id(t)


def is_zero(t: Tensor) -> bool:
    """Whether a tensor is known to hold nothing but zeros."""
    return _kind(t) == "zero"


def varying_shape(t: Tensor) -> tuple[int, ...]:
    """A tensor's shape, with 1 for the dims along which it is known to be constant."""
    if read_note(t).labels is not None:
        return tuple(t.shape)
    if _kind(t) in ("zero", "uniform"):
        return (1,) * t.dim()
    return tuple([1 if s == 0 else n for n, s in zip(t.shape, t.stride())])
