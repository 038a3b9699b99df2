"""Which counts a group may keep: clusters that shrink together, their levels, the order of their units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ..choices import NormGroups, Offsets, check_choice
from .constraints import LEAST, always_holds
from .plan import Plan


@dataclass(frozen=True)
class Lattice:
    """The kept counts that a plan's constraints allow.

    atom: ``(n_units,)`` atom of each unit. atom_size, atom_group: ``(n_atoms,)``. cluster: ``(n_groups,)`` cluster of
    each group. levels: ``(n_clusters,)`` the q of each cluster. allowed: per cluster the sorted j in 1..q that may be
    chosen (q, everything, always among them); group g then keeps ``n_units * j / q`` units. rounded: per cluster, the
    number of channels that its widths are a multiple of (the whole width apart). asked_rounding: what was asked.
    """

    atom: np.ndarray
    atom_size: np.ndarray
    atom_group: np.ndarray
    cluster: np.ndarray
    levels: np.ndarray
    allowed: tuple[np.ndarray, ...]
    rounded: np.ndarray
    asked_rounding: int

    @property
    def group_sizes(self) -> np.ndarray:
        return np.bincount(self.atom_group, weights=self.atom_size, minlength=len(self.cluster)).astype(np.int64)

    def counts(self, chosen: np.ndarray) -> np.ndarray:
        """Kept units per group when cluster ``c`` keeps ``chosen[..., c]`` of its levels."""
        return self.group_sizes * chosen[..., self.cluster] // self.levels[self.cluster]


def lattice(plan: Plan, norm_groups: NormGroups = "count", round_to: int = 1) -> Lattice:
    """Work out which kept counts hold all constraints of ``plan`` at once.

    round_to: widths become multiples of so many channels wherever that leaves a choice; a cluster where it doesn't
    uses the largest divisor of ``round_to`` that does (see ``Lattice.rounded``).

    Raises ValueError for an unknown ``norm_groups``.
    """
    check_choice("norm_groups", norm_groups, NormGroups)
    sizes, group_of = np.diff(plan.offsets), plan.group_of
    strict, steps, pinned = _sort_constraints(plan, norm_groups)
    cluster = _clusters(strict, group_of, len(sizes))
    atom, atom_size, atom_group = _atoms(strict, group_of)

    n_clusters = int(cluster.max()) + 1 if len(cluster) else 0
    levels = _gcd_by(cluster[atom_group], atom_size, n_clusters)
    per_level = sizes // levels[cluster]
    # A step of the cluster must be a whole number of steps for each of its groups.
    stride = _lcm_by(cluster, steps // np.gcd(steps, per_level), n_clusters)
    stride[np.unique(cluster[pinned])] = levels[np.unique(cluster[pinned])]
    least = _least_levels(plan, cluster, levels, per_level)
    choices = [
        np.arange(q, low - 1, -s)[::-1] for q, s, low in zip(levels.tolist(), stride.tolist(), least, strict=True)
    ]
    allowed, rounded = _round_widths(plan, cluster, per_level, choices, round_to)
    return Lattice(atom, atom_size, atom_group, cluster, levels, tuple(allowed), rounded, round_to)


def _least_levels(plan: Plan, cluster: np.ndarray, levels: np.ndarray, per_level: np.ndarray) -> list[int]:
    """The lowest level of each cluster at which no group and no row falls below ``LEAST``."""
    least = np.ones(len(levels), np.int64)
    np.maximum.at(least, cluster, -(-LEAST // np.maximum(per_level, 1)))
    for constraint in plan.constraints:
        units = constraint.rows[constraint.rows >= 0]
        if units.size and constraint.kind != "norm" and not always_holds(constraint):
            c = cluster[plan.group_of[units[0]]]
            least[c] = max(least[c], -(-LEAST * levels[c] // constraint.rows.shape[1]))
    return np.minimum(least, levels).tolist()


def _sort_constraints(plan: Plan, norm_groups: str) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Rows that must stay equal, a step of the kept count per group, and the groups that have to stay whole."""
    strict: list[np.ndarray] = []
    steps = np.ones(len(plan.groups), np.int64)
    pinned = np.zeros(len(plan.groups), bool)
    for constraint in plan.constraints:
        rows = constraint.rows
        units = rows[rows >= 0]
        if units.size == 0 or always_holds(constraint):
            continue
        stays = (rows < 0).sum(axis=1)
        even = bool((stays == stays[0]).all())
        groups = np.unique(plan.group_of[units])
        if constraint.kind == "norm" and norm_groups == "count" and (len(groups) > 1 or not even):
            uses = np.bincount(units, minlength=plan.n_units)
            per_unit = [np.unique(uses[plan.offsets[g] : plan.offsets[g + 1]]) for g in groups]
            if all(len(u) == 1 for u in per_unit):
                for g, u in zip(groups.tolist(), per_unit, strict=True):
                    steps[g] = math.lcm(int(steps[g]), len(rows) // math.gcd(len(rows), int(u[0])))
                continue
        strict.append(rows)
        if not even:  # equal shares of unequal rows are equal counts only when nothing goes
            pinned[groups] = True
    return strict, steps, pinned


def _clusters(strict: Sequence[np.ndarray], group_of: np.ndarray, n_groups: int) -> np.ndarray:
    pairs = [np.unique(group_of[rows[rows >= 0]]) for rows in strict]
    a = np.concatenate([np.repeat(p[:1], len(p)) for p in pairs]) if pairs else np.zeros(0, np.int64)
    b = np.concatenate(pairs) if pairs else np.zeros(0, np.int64)
    edges = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(n_groups, n_groups))
    return connected_components(edges, directed=False)[1].astype(np.int64) if n_groups else np.zeros(0, np.int64)


def _atoms(strict: Sequence[np.ndarray], group_of: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Units of one group that stand equally often in the same rows, as (atom of unit, sizes, groups)."""
    signature = _scatter_bits(group_of.astype(np.uint64))
    first = len(group_of)
    for rows in strict:
        # A sum of well-scattered row numbers tells multisets of rows apart (64 bits, some 10^5 units).
        bits = np.repeat(_scatter_bits(np.arange(first, first + len(rows), dtype=np.uint64)), rows.shape[1])
        flat = rows.reshape(-1)
        np.add.at(signature, flat[flat >= 0], bits[flat >= 0])
        first += len(rows)
    _, where, atom, size = np.unique(signature, return_index=True, return_inverse=True, return_counts=True)
    return atom.reshape(-1), size, group_of[where]


def _scatter_bits(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _gcd_by(owner: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    out = np.zeros(n, np.int64)
    np.gcd.at(out, owner, values)
    return out


def _lcm_by(owner: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    out = np.ones(n, np.int64)
    np.lcm.at(out, owner, values)
    return out


def _round_widths(
    plan: Plan, cluster: np.ndarray, per_level: np.ndarray, choices: Sequence[np.ndarray], round_to: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Leave the choices whose widths, in channels, are multiples of ``round_to`` (or of a divisor, if need be)."""
    n_clusters = len(choices)
    divisors = [d for d in range(round_to, 0, -1) if round_to % d == 0]
    strides = []
    for divisor in divisors:
        need = np.array(
            [
                math.lcm(1, *(divisor // math.gcd(divisor, m.index.shape[1]) for m in group.members))
                for group in plan.groups
            ],
            np.int64,
        )
        strides.append(_lcm_by(cluster, need // np.gcd(need, per_level), n_clusters))
    allowed, rounded = [], np.ones(n_clusters, np.int64)
    for c, all_of_it in enumerate(choices):
        for divisor, stride in zip(divisors, strides, strict=True):
            some = all_of_it[(all_of_it % stride[c] == 0) | (all_of_it == all_of_it[-1])]
            if len(some) > 1 or divisor == 1 or len(all_of_it) == 1:
                allowed.append(some)
                rounded[c] = divisor
                break
    return allowed, rounded


@dataclass(frozen=True)
class Ranking:
    """The order of units inside their atoms.

    rank: ``(n_units,)`` place of a unit in its atom, 0 for the first one to go.
    """

    lattice: Lattice
    rank: np.ndarray

    @property
    def level(self) -> np.ndarray:
        """``(n_units,)``: a unit stays while its cluster removes at most so many levels."""
        of = self.lattice
        per_level = of.atom_size // of.levels[of.cluster[of.atom_group]]
        return self.rank // per_level[of.atom]

    def kept(self, chosen: np.ndarray) -> np.ndarray:
        """``(n_units,)`` bool: what stays when cluster ``c`` keeps ``chosen[c]`` of its levels."""
        of = self.lattice
        gone = (of.levels - chosen)[of.cluster[of.atom_group]]
        return self.level >= gone[of.atom]

    def level_scores(self, values: np.ndarray) -> np.ndarray:
        """Mean score of the units of each cluster's levels: all clusters' levels in a row, rising inside a cluster."""
        of = self.lattice
        first = np.concatenate([[0], np.cumsum(of.levels)])
        at = first[of.cluster[of.atom_group]][of.atom] + self.level
        total = np.bincount(at, weights=values, minlength=first[-1])
        return total / np.bincount(at, minlength=first[-1])


def rank_units(lattice: Lattice, values: np.ndarray, offsets: Offsets) -> Ranking:
    """Order the units of every atom by score; equal scores go in the order of their indices, last one first.

    offsets: ``"same"`` averages over the atoms of one group that have the same size, so that each norm group or head
    keeps the same offsets; ``"independent"`` lets each choose its own.

    Raises ValueError for other ``offsets``.
    """
    check_choice("offsets", offsets, Offsets)
    atom, size = lattice.atom, lattice.atom_size
    start = np.concatenate([[0], np.cumsum(size)])[:-1]
    by_atom = np.argsort(atom, kind="stable")
    offset = np.empty(len(atom), np.int64)
    offset[by_atom] = np.arange(len(atom)) - start[atom[by_atom]]
    if offsets == "same":
        kinds = np.unique(np.stack([lattice.atom_group, size]), axis=1, return_inverse=True)[1].reshape(-1)
        # Atoms of one kind share a table of offsets; its start is the running sum of the kinds' sizes.
        kind_size = np.zeros(int(kinds.max(initial=-1)) + 1, np.int64)
        kind_size[kinds] = size
        at = (np.cumsum(kind_size) - kind_size)[kinds][atom] + offset
        values = (np.bincount(at, weights=values) / np.bincount(at))[at]
    order = np.lexsort((-offset, values, atom))
    rank = np.empty(len(atom), np.int64)
    rank[order] = np.arange(len(atom)) - start[atom[order]]
    return Ranking(lattice, rank)
