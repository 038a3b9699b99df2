"""Which heads can be rotated: read from the plan.

A plan knows every place that a head's dims touch. Where the dims of queries and keys touch the rows of linear layers
alone, nothing that looks at single dims (a norm's weight, an embedding of positions) stands between these layers and
the product; where the values' dims touch rows of linear layers and columns of others alone, likewise. What leaves no
parameter behind (an activation, say) is found out when the rotated model's outputs are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import nn

from ..plan.plan import Constraint, Group, Member, Plan

Kind = Literal["qk", "vo"]
Sides = tuple[tuple["Place", ...], tuple["Place", ...]]


@dataclass(frozen=True)
class Place:
    """Where heads lie along dim ``dim`` of a linear layer's parameter. channels: ``(n_heads, head_dim)``."""

    parameter: str
    dim: int
    channels: np.ndarray

    @property
    def module(self) -> str:
        return self.parameter.rpartition(".")[0]

    @property
    def is_weight(self) -> bool:
        return self.parameter.rpartition(".")[2] == "weight"


@dataclass(frozen=True)
class HeadPair:
    """Two sides of an attention's heads of which the function sees the product over the dims of a head, and no more.

    kind: ``"qk"``, queries on the left and keys on the right; ``"vo"``, values and the columns of what reads the heads.
    centred: the softmax doesn't see the mean of the right side over the tokens.
    """

    attention: str
    kind: Kind
    left: tuple[Place, ...]
    right: tuple[Place, ...]
    centred: bool = False

    @property
    def name(self) -> str:
        return f"{self.attention} {self.kind}"

    @property
    def shape(self) -> tuple[int, int]:
        """Heads, dims of a head."""
        n_heads, head_dim = self.left[0].channels.shape
        return n_heads, head_dim


class _Standing(Exception):
    """Why heads are left as they are."""


def find_heads(model: nn.Module, plan: Plan) -> tuple[tuple[HeadPair, ...], dict[str, str]]:
    """What can be rotated in ``model``; and for every other attention's heads in ``plan`` the reason why not.

    Attentions whose heads go as a whole have no dims to remove, and are in neither.
    """
    found: dict[bytes, HeadPair] = {}
    units: dict[bytes, np.ndarray] = {}
    standing: dict[str, str] = {}
    for constraint in plan.constraints:
        if constraint.kind != "heads":
            continue
        attention = constraint.place.partition(" (")[0]
        for group, rows in _by_group(plan, constraint):
            told = any(f.place == constraint.place and np.isin(f.units, rows).any() for f in plan.scale_fixes)
            kind: Kind = "qk" if told or all(m.dim == 0 for m in group.members) else "vo"
            try:
                left, right = _sides(model, plan, constraint, group, rows, kind, told)
                pair = HeadPair(attention, kind, left, right, centred=told)
            except _Standing as reason:
                standing[f"{attention} {kind}"] = str(reason)
            else:
                found[rows.tobytes()], units[rows.tobytes()] = pair, np.unique(rows)
    for key in [k for k in found if any(k != o and np.intersect1d(units[k], units[o]).size for o in units)]:
        standing[found.pop(key).name] = "it shares weights with another attention"
    return tuple(found.values()), standing


def _by_group(plan: Plan, constraint: Constraint) -> Iterator[tuple[Group, np.ndarray]]:
    """A constraint's heads, ``(n_heads, head_dim)``, of queries and keys and of values: they are in groups apart."""
    rows = constraint.rows[(constraint.rows >= 0).any(1)]
    of = plan.group_of[rows.max(1)]
    for g in dict.fromkeys(of.tolist()):
        yield plan.groups[g], rows[of == g]


def _sides(
    model: nn.Module, plan: Plan, constraint: Constraint, group: Group, rows: np.ndarray, kind: Kind, told: bool
) -> Sides:
    """What is left and right of the product of these heads. Raises _Standing where they can't be rotated.

    told: the plan says where the queries are.
    """
    if (rows < 0).any():
        raise _Standing("some of its dims have to stay")
    local = rows - plan.offsets[plan.position[group.name]]
    if (local < 0).any() or (local >= group.n_units).any():
        raise _Standing("its dims are in several groups")
    for m in group.members:
        if not _is_linear(model, plan, m):
            raise _Standing(f"{m.place} stands in between")
    if np.unique(rows).size < rows.size:
        raise _Standing("several of its heads share dims")
    members = [(m, m.index[local]) for m in group.members]
    if told:
        left, right = _queries_and_keys(plan, constraint, members)
    elif kind == "qk":
        left, right = _two_projections(members)
    else:
        left, right = _values_and_readers(members)
    if not left or not right:
        raise _Standing("only one side of the product is made by linear layers")
    return left, right


def _is_linear(model: nn.Module, plan: Plan, member: Member) -> bool:
    """Whether a place is a dim of a plain linear layer's own weight, or its bias."""
    name, _, leaf = member.parameter.rpartition(".")
    if member.parameter in plan.buffers or leaf not in ("weight", "bias"):
        return False
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        return False
    return module._parameters.get(leaf) is not None


def _queries_and_keys(plan: Plan, constraint: Constraint, members: list[tuple[Member, np.ndarray]]) -> Sides:
    """The queries are what takes the factor of the softmax scale; a fused projection holds both in one weight."""
    if any(m.dim for m, _ in members):
        raise _Standing("its queries or keys are read by something else as well")
    rows = {n: r for f in plan.scale_fixes if f.place == constraint.place for n, r in f.targets}
    left: list[Place] = []
    right: list[Place] = []
    for m, channels in members:
        is_query = np.isin(channels, rows.get(m.parameter, np.zeros(0, np.int64)))
        for side, mask in ((left, is_query), (right, ~is_query)):
            n = mask.sum(-1)
            if (n > 1).any() or (n != n.flat[0]).any():
                raise _Standing(f"a dim has several channels in {m.place}")
            if n.flat[0]:
                side.append(Place(m.parameter, m.dim, channels[mask].reshape(channels.shape[:2])))
    return tuple(left), tuple(right)


def _two_projections(members: list[tuple[Member, np.ndarray]]) -> Sides:
    """Queries and keys under a softmax scale that is told: which of them is which isn't known, nor does it matter."""
    places = [Place(m.parameter, m.dim, c[..., 0]) for m, c in members if c.shape[-1] == 1]
    modules = list(dict.fromkeys(p.module for p in places))
    if len(modules) != 2 or len(places) != len(members):
        raise _Standing("its queries and keys can't be told apart")
    left, right = (tuple(p for p in places if p.module == m) for m in modules)
    return left, right


def _values_and_readers(members: list[tuple[Member, np.ndarray]]) -> Sides:
    for m, channels in members:
        if channels.shape[-1] > 1:
            raise _Standing(f"a dim has several channels in {m.place}")
    places = [Place(m.parameter, m.dim, c[..., 0]) for m, c in members]
    return tuple(p for p in places if p.dim == 0), tuple(p for p in places if p.dim == 1)
