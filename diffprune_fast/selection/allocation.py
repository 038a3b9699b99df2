"""How many units each group keeps: the least damage to the model's output that meets a budget.

Two tables meet here. A *damage curve* says, for every number of levels that a cluster may keep, what the output loses;
a *resource* (MACs, parameters or units) says what a choice of levels costs. The greedy walk knows nothing else, so that
a curve may come from scores, as here, or from measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from ..plan.lattice import Lattice, Ranking
from ..plan.plan import Plan
from ..scoring.scores import Sensitivities
from .costs import CostOfLevels
from .search import Unreachable

Curves = Sequence[np.ndarray]

# A cluster whose weights are used so often in one sample's forward, or less, works on the time embedding (or another
# vector per sample); the next ones are used at every position.
USES_OF_AN_EMBEDDING = 2.0
# Their curve says far more than is left once the consumers are solved anew: on digits, a third to two thirds gone,
# 1,400 to 8,300 times as much, where other clusters have some 25 to 600. Half the parameters, loss as a multiple of the
# dense model's after compensation, with a sixteenth, a quarter, all of it: a DiT 1.045, 1.030, 1.030; a UNet with
# cross-attention 1.025, 1.030, 1.030.
EMBEDDING_DISCOUNT = 1 / 4
# What is below this share of the largest damage is nothing.
RESOLUTION = 1e-9


def coherent_curves(order: Ranking, damage: np.ndarray) -> list[np.ndarray]:
    """What each cluster's output loses when it keeps ``j`` of its levels, ``(levels + 1,)`` per cluster.

    damage: ``(n_units,)`` squared changes of the output. The changes of one cluster's units point the same way more
    often than not, so they add in amplitude: ``(sum over the units gone of sqrt(damage))^2``. A plain sum strips deep
    groups bare.
    """
    of = order.lattice
    first = np.concatenate([[0], np.cumsum(of.levels)])
    at = first[of.cluster[of.atom_group]][of.atom] + order.level
    roots = np.bincount(at, weights=np.sqrt(damage), minlength=int(first[-1]))
    return [np.concatenate([[0.0], np.cumsum(roots[start:stop])])[::-1] ** 2 for start, stop in pairwise(first)]


def measured_curves(of: Lattice, sensitivities: Sensitivities, forecast: Curves | None = None) -> list[np.ndarray]:
    """The same from trials of every cluster: the forecast's curves, bent so that they go through what was measured.

    forecast: see :func:`coherent_curves`; None is the square of the share gone. Between two trials the logarithm of
    their ratio to the forecast is interpolated, beyond the ends it is that of the nearest. A cluster that wasn't tried,
    and so stays as it is told, costs nothing.
    """
    curves = []
    known = sensitivities.damage[~np.isnan(sensitivities.damage)]
    least = max(RESOLUTION * known.max(initial=0.0), np.finfo(float).tiny)
    for c, q in enumerate(of.levels.tolist()):
        g = int(np.flatnonzero(of.cluster == c)[0])
        tried = ~np.isnan(sensitivities.shares[g])
        gone = 1 - np.arange(q + 1) / q
        if not tried.any():
            curves.append(np.zeros(q + 1))
            continue
        shares, damage = sensitivities.shares[g][tried], np.maximum(sensitivities.damage[g][tried], least)
        shape = gone**2 if forecast is None else forecast[c]
        shape = shape + RESOLUTION * max(float(shape.max()), least) * gone**2  # nowhere nothing but where all stays
        ratio = np.log(damage / np.interp(shares, gone[::-1], shape[::-1]))
        bent = shape * np.exp(np.interp(gone, shares, ratio))
        curves.append(np.maximum.accumulate(bent[::-1])[::-1])
    return curves


@dataclass(frozen=True)
class Resource:
    """What a choice of levels costs: ``constant + sum_k scale[k] * prod_i size[factors[k, i]]``, in whole numbers.

    ``size = base + per_level @ chosen``; the last of the sizes is 1, for terms of fewer factors. scale:
    ``(n_terms,)``. factors: ``(n_terms, width)``. base: ``(n_sizes,)``. per_level: ``(n_sizes, n_clusters)``.
    """

    scale: np.ndarray
    factors: np.ndarray
    base: np.ndarray
    per_level: np.ndarray
    constant: float = 0.0

    @classmethod
    def of(cls, plan: Plan, lattice: Lattice, kind: str, counted: np.ndarray | None = None) -> Resource:
        """kind: ``"macs"``, ``"params"`` or ``"ratio"``: the units of the groups that are ``counted``."""
        if kind == "macs":
            costs = [(float(c.scale), c.extents) for c in plan.costs if not c.attention]
            return cls._made(costs, plan.extents.base, plan.extents.per_group, lattice)
        if kind == "params":
            return cls._of_params(plan, lattice)
        units = np.ones(len(plan.groups)) if counted is None else counted.astype(float)
        return cls._made([(1.0, (0,))], np.zeros(1), units[None], lattice)

    @classmethod
    def _of_params(cls, plan: Plan, lattice: Lattice) -> Resource:
        dims: dict[tuple[str, int], int] = {}
        of: dict[str, list[int]] = {}
        entries = []
        for g, group in enumerate(plan.groups):
            for m in group.members:
                if m.parameter in plan.buffers:
                    continue
                place = (m.parameter, m.dim)
                if place not in dims:
                    dims[place] = len(dims)
                    of.setdefault(m.parameter, []).append(dims[place])
                entries.append((dims[place], g, m.index.shape[1]))
        per_group = np.zeros((len(dims), len(plan.groups)))
        for extent, g, times in entries:
            per_group[extent, g] += times
        whole = np.array([plan.shapes[name][dim] for name, dim in dims], float)
        base = whole - per_group @ np.diff(plan.offsets)
        parameters = {n: shape for n, shape in plan.shapes.items() if n not in plan.buffers}
        costs = []
        for name, extents in of.items():
            size = float(np.prod(parameters[name], dtype=float))
            costs.append((size / float(np.prod(whole[extents])) if size else 0.0, tuple(extents)))
        constant = sum(float(np.prod(shape, dtype=float)) for n, shape in parameters.items() if n not in of)
        return cls._made(costs, base, per_group, lattice, constant)

    @classmethod
    def _made(
        cls,
        costs: Sequence[tuple[float, tuple[int, ...]]],
        base: np.ndarray,
        per_group: np.ndarray,
        lattice: Lattice,
        constant: float = 0.0,
    ) -> Resource:
        width = max((len(extents) for _, extents in costs), default=1)
        factors = np.full((len(costs), max(width, 1)), len(base), np.int64)
        for i, (_, extents) in enumerate(costs):
            factors[i, : len(extents)] = extents
        units_per_level = lattice.group_sizes / lattice.levels[lattice.cluster]
        per_level = np.zeros((len(base) + 1, len(lattice.levels)))
        for g, c in enumerate(lattice.cluster.tolist()):
            per_level[:-1, c] += per_group[:, g] * units_per_level[g]
        return cls(np.array([s for s, _ in costs]), factors, np.append(base, 1.0), per_level, constant)

    def at(self, chosen: np.ndarray) -> float:
        sizes = self.base + self.per_level @ chosen
        return float((self.scale * sizes[self.factors].prod(axis=1)).sum() + self.constant)

    @cached_property
    def _moves(self) -> np.ndarray:
        """``(n_terms, width)`` bool: which factors any level changes."""
        return np.asarray(self.per_level.any(axis=1))[self.factors]

    @cached_property
    def _curved(self) -> np.ndarray:
        """Which terms have more than two factors that anything changes: the rest is a quadratic form."""
        return self._moves.sum(axis=1) > 2

    @cached_property
    def _quadratic(self) -> tuple[np.ndarray, np.ndarray]:
        """Slope at no levels, ``(n_clusters,)``, and second derivatives, ``(n_clusters, n_clusters)``, of the rest."""
        scale, factors = self.scale[~self._curved], self.factors[~self._curved]
        moves = self._moves[~self._curved]
        # The two factors that may change first; all others are constants of the scale.
        ordered = np.take_along_axis(factors, np.argsort(~moves, axis=1, kind="stable"), axis=1)
        scale = scale * self.base[ordered[:, 2:]].prod(axis=1)
        one, two = ordered[:, 0], ordered[:, 1] if ordered.shape[1] > 1 else np.full(len(ordered), len(self.base) - 1)
        per_one, per_two = self.per_level[one], self.per_level[two]
        slope = (scale * self.base[two]) @ per_one + (scale * self.base[one]) @ per_two
        mixed = per_one.T @ (scale[:, None] * per_two)
        return slope, mixed + mixed.T

    @property
    def second(self) -> np.ndarray:
        """``(n_clusters, n_clusters)`` second derivatives of the quadratic part."""
        return self._quadratic[1]

    def slope(self, chosen: np.ndarray) -> np.ndarray:
        """``(n_clusters,)`` derivatives of the quadratic part."""
        slope, second = self._quadratic
        return slope + second @ chosen

    def change(self, chosen: np.ndarray, slope: np.ndarray, cluster: np.ndarray, step: np.ndarray) -> np.ndarray:
        """What it costs more when, each alone, ``cluster[i]`` keeps ``step[i]`` levels more, ``(n,)``."""
        found = slope[cluster] * step + self.second[cluster, cluster] / 2 * step**2
        if self._curved.any():
            factors = self.factors[self._curved]
            now = (self.base + self.per_level @ chosen)[factors][:, :, None]
            then = now + self.per_level[:, cluster][factors] * step
            found = found + self.scale[self._curved] @ (then.prod(axis=1) - now.prod(axis=1))
        return found


def discounted(plan: Plan, lattice: Lattice, damage: np.ndarray) -> np.ndarray:
    """Damage for a budget of parameters: that of units of the time embedding is counted at a quarter.

    Their consumers (an adaptive norm's linear layers) see one vector per sample, a function of little more than the
    time, which the units that stay can say as well; what is lost by slicing comes back with compensation. A budget of
    MACs needs no such rule, as these layers have hardly any.
    """
    macs, params = (Resource.of(plan, lattice, kind).slope(lattice.levels) for kind in ("macs", "params"))
    of_embedding = (macs > 0) & (macs <= USES_OF_AN_EMBEDDING * params)
    factor = np.where(of_embedding[lattice.cluster], EMBEDDING_DISCOUNT, 1.0)
    return damage * np.repeat(factor, np.diff(plan.offsets))


def allocate(
    choices: Sequence[np.ndarray], curves: Curves, resource: Resource | CostOfLevels, limit: float
) -> np.ndarray:
    """Kept levels per cluster, ``(n_clusters,)``, that cost at most ``limit`` and damage little.

    choices: per cluster the sorted numbers of levels that may stay. curves: damage by kept levels, see
    :func:`coherent_curves`. Greedy, with a look-ahead over every lower choice of every cluster: what adds the least
    damage for what it saves goes next, until the limit holds; then single steps come back, the most damage for what
    they cost first, as long as the limit holds. A smaller limit never ends at a larger cost.

    Raises Unreachable where even the smallest choices cost more than ``limit``.
    """
    least = np.array([c[0] for c in choices], np.int64)
    if resource.at(least) > limit:
        raise Unreachable(resource.at(least))
    cluster = np.repeat(np.arange(len(choices)), [len(c) for c in choices])
    level = np.concatenate([*choices, np.zeros(0, np.int64)]).astype(np.int64)
    damage = np.concatenate([*(curve[c] for curve, c in zip(curves, choices, strict=True)), np.zeros(0)])
    place = np.cumsum([len(c) for c in choices]) - 1  # of each cluster's present choice, in the three above
    first = place - [len(c) - 1 for c in choices]
    chosen = level[place]
    slope, spent = resource.slope(chosen), resource.at(chosen)
    while spent > limit:
        saved = -resource.change(chosen, slope, cluster, level - chosen[cluster])
        lower = np.flatnonzero((level < chosen[cluster]) & (saved > 0))
        if not lower.size:  # measured costs may have a bump that no single cluster gets over
            place = first.copy()
            break
        price = (damage[lower] - damage[place[cluster[lower]]]) / saved[lower]
        cheapest = lower[price == price.min()]
        move = int(cheapest[np.argmax(saved[cheapest])])
        c = int(cluster[move])
        slope = slope + resource.second[c] * (level[move] - chosen[c])
        chosen[c], place[c], spent = level[move], move, spent - saved[move]
    return _given_back(cluster, level, damage, first, place, resource, limit)


def _given_back(
    cluster: np.ndarray,
    level: np.ndarray,
    damage: np.ndarray,
    first: np.ndarray,
    place: np.ndarray,
    resource: Resource | CostOfLevels,
    limit: float,
) -> np.ndarray:
    last = np.append(first[1:], len(level)) - 1
    while True:
        chosen = level[place]
        up = np.flatnonzero(place < last)
        step = level[place[up] + 1] - chosen[up]
        cost = resource.change(chosen, resource.slope(chosen), up, step)
        fits = resource.at(chosen) + cost <= limit
        if not fits.any():
            return chosen
        up, cost = up[fits], cost[fits]
        gain = (damage[place[up]] - damage[place[up] + 1]) / np.maximum(cost, 1e-300)
        place[up[np.argmax(gain)]] += 1
