"""Whole heads as units: which attentions a second walk takes by the head.

The dims of a head go one by one where that leaves the function alone. Rotary embeddings pair dims by position, and a
softmax scale may have no place to go: there, and wherever it is asked for, all dims of a head are one unit. The second
walk finds the reshapes that split channels into heads by the sizes that the first one saw in the attention products.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..plan.plan import Plan
from .records import Attended


class Heads:
    """The attentions whose heads go as a whole: asked by the reshapes of a second walk."""

    def __init__(self, attended: Iterable[Attended]) -> None:
        self._sizes: dict[int, set[tuple[str, int]]] = {}
        for a in attended:
            self._sizes.setdefault(a.n_heads, set()).add((a.module, a.n_dims))

    def split_in(self, module: str, n_heads: int, n_dims: int) -> bool:
        """Whether a reshape into ``(n_heads, n_dims)`` in ``module`` makes the heads of one of the attentions.

        Or several operands of each head at once: q, k and v of one projection.
        """
        return any(
            n_dims % d == 0 and (m == module or _inside(m, module) or _inside(module, m))
            for m, d in self._sizes.get(n_heads, ())
        )


def _inside(module: str, outer: str) -> bool:
    return outer != "" and module.startswith(f"{outer}.")


def heads_to_take_whole(attended: Iterable[Attended], unit_of: np.ndarray, units: str) -> Heads | None:
    """The attentions that ``units`` has walked again: with ``"auto"``, those whose dims can't all go one by one.

    unit_of: ``(n_nodes,)`` of the first plan. An attention is all products of one module.
    """
    if units == "dims":
        return None
    several = [a for a in attended if a.n_heads > 1]
    stuck = {a.module for a in several if units == "heads" or a.rows is None or _stuck(unit_of[a.rows])}
    return Heads([a for a in several if a.module in stuck]) if stuck else None


def _stuck(units: np.ndarray) -> bool:
    """Whether dims stay, or every head is one unit already."""
    return bool((units < 0).any() or (units == units[:, :1]).all())


def reach(plan: Plan) -> float:
    """How many weights lie on channels that can be removed, along each dim of theirs."""
    size = {name: float(np.prod(shape, dtype=np.float64)) for name, shape in plan.shapes.items()}
    members = [m for g in plan.groups if g.n_units > 2 for m in g.members if m.parameter not in plan.buffers]
    return sum(size[m.parameter] * m.index.size / plan.shapes[m.parameter][m.dim] for m in members)
