"""Tensors that a forward makes of nothing but numbers: where they are the same in every channel, any channels may go.

What was made in one call and all its views share a :class:`Made`, because a write into one of them is one into all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .walk import Walk


_MADE = {
    **dict.fromkeys(("zeros", "new_zeros", "zeros_like"), "zero"),
    **dict.fromkeys(("ones", "new_ones", "ones_like", "full", "new_full", "full_like"), "uniform"),
    "arange": "ids",
}


_VIEWS = "alias detach view reshape expand unsqueeze squeeze slice select transpose permute t contiguous to"


_IS_VIEW = frozenset(_VIEWS.split())


@dataclass
class Made:
    """What is in a tensor: "zero" and "uniform" everywhere the same, "ids" 0, 1, 2, ..., "written" anything.

    diagonal: the tensor of zeros whose diagonal, and nothing else, was written.
    """

    content: str
    diagonal: int | None = None


def _content(t: Any) -> str:
    made: Made | None = getattr(t, "_made", None)
    return made.content if made is not None else ""


def follow(func: Any, args: Any, tensors: Sequence[Tensor]) -> Made | None:
    """Look at an op's operands before it runs; what its output shares with them, or is made of."""
    name = func.overloadpacket.__name__
    if name in _MADE:
        return Made(_MADE[name]) if name != "arange" or len(args) == 1 else None
    known = [t._made for t in tensors if hasattr(t, "_made")]
    if not known:
        return None
    view = any(r.alias_info is not None for r in func._schema.returns)
    if view and not func._schema.is_mutable and name in _IS_VIEW and _content(args[0]) in ("zero", "uniform"):
        return known[0]
    diagonal = name == "index_put_" and _content(args[0]) == "zero" and _fills_diagonal(*args[:3])
    if view:  # a write, or an alias that may be written to
        for made in known:
            if made.content != "ids" or made is getattr(args[0], "_made", None):
                made.content, made.diagonal = "written", None
    if diagonal:
        args[0]._made.diagonal = id(args[0])
    return None


def _fills_diagonal(x: Tensor, ids: Sequence[Tensor | None], values: Tensor) -> bool:
    """Whether ``x[ids] = values`` writes the same along all of a square matrix's diagonal."""
    if len(ids) != 2 or ids[0] is not ids[1] or _content(ids[0]) != "ids":
        return False
    alike = values.dim() < x.dim() - 1 or values.shape[0] == 1 or values.stride(0) == 0
    return alike and ids[0] is not None and x.shape[0] == x.shape[1] == ids[0].shape[0]


def is_diagonal(t: Tensor) -> bool:
    """A matrix with the same kernel all along its diagonal: every channel goes through it by itself."""
    made: Made | None = getattr(t, "_made", None)
    return made is not None and made.diagonal == id(t)


def spread(walk: Walk, t: Tensor) -> tuple[int, ...]:
    """A tensor's shape, with 1 for the dims along which it is known to be constant."""
    if walk.labels(t) is not None:
        return tuple(t.shape)
    if _content(t) in ("zero", "uniform"):
        return (1,) * t.dim()
    return tuple([1 if s == 0 else n for n, s in zip(t.shape, t.stride())])
