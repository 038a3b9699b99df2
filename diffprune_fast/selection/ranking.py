"""From scores to an order in which units go that never breaks a constraint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from ..tracing import Plan
from .constraints import Lattice

Rows = Literal["independent", "same"]


def check_scores(plan: Plan, values: np.ndarray) -> np.ndarray:
    """Scores as ``(n_units,)`` float64.

    Raises ValueError for another length and for NaN or infinity, naming the groups.
    """
    values = np.asarray(values, np.float64)
    if values.shape != (plan.n_units,):
        raise ValueError(
            f"scores have shape {values.shape}, the plan of {plan.model_class} has {plan.n_units} units: "
            "score with the plan that is selected from"
        )
    bad = ~np.isfinite(values)
    if bad.any():
        groups = np.unique(np.searchsorted(plan.offsets, np.flatnonzero(bad), side="right") - 1)
        names = ", ".join(plan.groups[g].name for g in groups[:3]) + (", ..." if len(groups) > 3 else "")
        raise ValueError(
            f"{int(bad.sum())} of {len(values)} scores are NaN or infinite (groups {names}): look for NaN in the "
            "model's weights and for a loss that overflows"
        )
    return values


def normalised(plan: Plan, values: np.ndarray) -> np.ndarray:
    """Each group's scores divided by their mean, so that groups compare; a group of zeros counts as average.

    Without it a global ranking collapses onto the layers with the smallest gradients.
    """
    sizes = np.diff(plan.offsets)
    group_of = np.repeat(np.arange(len(sizes)), sizes)
    mean = np.bincount(group_of, weights=np.abs(values), minlength=len(sizes)) / np.maximum(sizes, 1)
    out = np.ones_like(values)
    np.divide(values, mean[group_of], out=out, where=mean[group_of] > 0)
    return out


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


def rank_units(lattice: Lattice, values: np.ndarray, rows: Rows) -> Ranking:
    """Order the units of every atom by score; equal scores go in the order of their indices, last one first.

    rows: ``"same"`` averages over the atoms of one group that have the same size, so that each norm group or head
    keeps the same offsets; ``"independent"`` lets each choose its own.

    Raises ValueError for other ``rows``.
    """
    if rows not in get_args(Rows):
        raise ValueError(f"rows={rows!r}: choose {' or '.join(map(repr, get_args(Rows)))}")
    atom, size = lattice.atom, lattice.atom_size
    start = np.concatenate([[0], np.cumsum(size)])[:-1]
    by_atom = np.argsort(atom, kind="stable")
    offset = np.empty(len(atom), np.int64)
    offset[by_atom] = np.arange(len(atom)) - start[atom[by_atom]]
    if rows == "same":
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
