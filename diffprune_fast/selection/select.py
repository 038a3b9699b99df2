"""``select``: from a plan, its scores and a budget to the keep-sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from ..choices import Allocation, NormGroups, Offsets, RankingName, Rounding, check_choice
from ..plan.lattice import Lattice, Ranking, lattice, rank_units
from ..plan.plan import Plan
from . import search
from .allocation import Curves, Resource, allocate, coherent_curves, discounted, measured_curves
from .budgets import UNITS, Budget, BudgetError, check_number, check_ratio, match_groups, parse_budgets
from .costs import ALLOCATION_POINTS, Cost, CostOfLevels, allocated_by, costs_for, points, words_of
from .counting import keep_of_counts
from .ranking import check_scores, normalised
from .words import asked_and_met, cost_of, named, notes_on, smallest_step, unreachable, why_nothing

if TYPE_CHECKING:
    from ..scoring.scores import Scores


@dataclass(frozen=True)
class Selection:
    """Which units stay, with what was asked and what was met.

    keep: every group's name to the sorted int64 indices of its units that stay. asked, met: the budget, in words.
    notes: everything in which the result departs from the request (rounding, constraints, ties between groups).
    allocation: how the groups shared a global budget; ``"uniform"`` where the ranking is local.
    """

    keep: dict[str, np.ndarray]
    asked: str
    met: str
    norm_groups: NormGroups
    ranking: str
    notes: tuple[str, ...] = ()
    allocation: str = "uniform"

    def __str__(self) -> str:
        head = f"asked: {self.asked}\nmet:   {self.met}\n{self.ranking} ranking, {self.allocation} allocation, "
        head += f"norm groups: {self.norm_groups}"
        return "\n".join([head, *(f"note:  {note}" for note in self.notes)])


def select(
    plan: Plan,
    scores: Scores | np.ndarray,
    *,
    ratio: float | None = None,
    params: float | None = None,
    macs: float | None = None,
    latency: float | None = None,
    memory: float | None = None,
    budgets: Mapping[str, float] = MappingProxyType({}),
    costs: Mapping[str, Cost] = MappingProxyType({}),
    counts: Mapping[str, int] | None = None,
    ranking: RankingName | None = None,
    allocation: Allocation | str | None = None,
    round_to: int | None = 8,
    norm_groups: NormGroups = "count",
    offsets: Offsets = "independent",
    rounding: Rounding | None = None,
    ratios: Mapping[str, float] | None = None,
    ignore: Sequence[str] = (),
    max_ratio: float = 0.9,
) -> Selection:
    """Choose the units that stay so that the budget is met and every constraint holds.

    Args:
        plan: what :func:`trace` gave.
        scores: ``(plan.n_units,)`` by plan-wide unit id, or what :func:`score` gave; inside a group the
            lowest go first.
        ratio: share of units that goes (0.3 when no budget is given).
        params, macs: what stays, as a share (0.5) or a number (3_400_000_000); met from below.
        latency: the share of the dense model's time that stays; ``costs`` has what
            :func:`~diffprune_fast.footprint.measure_times` gave.
        memory: the share of the dense model's peak memory that stays, or a number of bytes; ``costs`` has what
            :func:`~diffprune_fast.footprint.count_memory` gave. All but ratio may be combined.
        budgets: further ones by name, as shares or numbers.
        costs: what they count, functions of kept counts by the budget's name (see :class:`~.costs.Cost`); a budget
            that another package registers (``diffprune_fast.budgets``) needs none.
        counts: in place of a budget, how many units each group keeps, by name; the others stay whole.
        ranking: ``"local"`` takes the same share of every group, ``"global"`` lets the groups share the
            budget. None is local for a ratio, global for params and macs.
        allocation: how they share it. ``"gauss-newton"``: by the damage to the model's output that ``Scores`` estimate,
            the least for what it saves. ``"measured"``: that damage corrected by trials of every cluster, see
            :func:`~diffprune_fast.sensitivity.measure_sensitivities`. ``"mean"``: by the scores, each divided by its
            group's mean, which says little about the damage. None is gauss-newton where the scores have their damage.
            Or the name of another package's (``diffprune_fast.allocations``, see :class:`~.costs.Allocator`).
        round_to: widths become multiples of so many channels where the constraints leave that choice; None or 1: any.
        norm_groups: ``"exact"`` keeps the membership of norm groups, ``"count"`` only their divisibility.
        offsets: ``"independent"`` keeps equally many units in every norm group or head, ``"same"`` the same offsets.
        rounding: ``"reference"`` removes ``int(ratio * n)`` of the n units of a group, or of each norm group's or
            head's share of it, as the method's published code does; local ratio and ``norm_groups="count"`` only,
            without round_to.
        ratios: shares for groups by name pattern (``fnmatch`` on group and parameter names; the first that matches
            counts; 0 keeps a group whole).
        ignore: patterns of groups that stay whole.
        max_ratio: the most that a global ranking, or any params or MACs budget, takes from one group.

    Returns:
        The units that stay, with what was asked and met.

    Raises:
        BudgetError: the budget is out of reach; the message says how far one can get.
        ValueError, TypeError: wrong options, scores of another plan or scores that aren't finite.

    Example:
        >>> import torch
        >>> from diffprune_fast import trace
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> plan = trace(model, (torch.zeros(1, 4),))
        >>> selection = select(plan, np.arange(16.0), ratio=0.75, round_to=1)
        >>> selection.keep["0"]
        array([12, 13, 14, 15])

    Source: Fang, Ma and Wang, "Structural Pruning for Diffusion Models", NeurIPS 2023 (local ratio).
    """
    if counts is not None:
        if any(given is not None for given in (ratio, params, macs, latency, memory, rounding)) or ratios or ignore:
            raise ValueError("counts say how many units every group keeps: leave out budgets, ratios and ignore")
        return _by_counts(plan, scores, counts, norm_groups, offsets)
    ours = {"ratio": ratio, "params": params, "macs": macs, "latency": latency, "memory": memory}
    asked_for = parse_budgets({**ours, **budgets}, budgets)
    budget = asked_for[0]
    costs = costs_for(plan, [b.kind for b in asked_for if b.kind not in ("ratio", "params", "macs")], costs)
    ranking = ranking or ("local" if budget.kind == "ratio" else "global")
    _check_options(budget, ranking, round_to, norm_groups, rounding, max_ratio)
    values = check_scores(plan, scores if isinstance(scores, np.ndarray) else scores.values)
    used = _allocation(scores, ranking, allocation)

    allowed = lattice(plan, norm_groups, 1 if rounding == "reference" else round_to or 1)
    order = rank_units(allowed, values, offsets)
    own, notes = _own_ratios(plan, allowed, ratios or {}, ignore)
    free = np.isnan(own) & np.array([len(c) > 1 for c in allowed.allowed], bool)
    if not (free.any() or (own > 0).any()):
        raise BudgetError(
            f"{budget} can't be met: no group of {plan.model_class} may be pruned ({why_nothing(plan, ignore)})"
        )

    if budget.kind == "ratio" and ranking == "local":
        shares = np.where(np.isnan(own), budget.value, own)
        chosen = _by_ratio(allowed, shares, rounding)
        if (chosen == allowed.levels).all():
            raise BudgetError(f"{budget} removes nothing: {smallest_step(allowed, free)}")
    else:
        curves_for = partial(_curves, plan, allowed, order, scores, used)
        chosen = _in_turn(plan, allowed, order, values, asked_for, costs, ranking, own, max_ratio, curves_for, used)
    kept = allowed.counts(chosen)
    notes += notes_on(plan, allowed, budget, chosen, free, rounding)
    notes += _on_allocation(plan, budget, ranking, allocation, used, kept)
    keep = plan.keep_of(order.kept(chosen))
    said = [asked_and_met(plan, allowed, one, kept, free, costs) for one in asked_for]
    asked = " and ".join(one for one, _ in said)
    met = ", ".join([*(told.partition(";")[0] for _, told in said[1:] if ";" in told), said[0][1]])
    return Selection(keep, asked, met, norm_groups, ranking, tuple(notes), used)


def _by_counts(
    plan: Plan, scores: Scores | np.ndarray, counts: Mapping[str, int], norm_groups: NormGroups, offsets: Offsets
) -> Selection:
    values = check_scores(plan, scores if isinstance(scores, np.ndarray) else scores.values)
    keep, kept = keep_of_counts(plan, values, counts, norm_groups, offsets)
    asked, met = "the counts of every group", cost_of(plan, kept)
    return Selection(keep, asked, met, norm_groups, "local", (), "as counted")


def _allocation(scores: Scores | np.ndarray, ranking: str, asked: str | None) -> str:
    """How the groups share the budget: ``asked``, or the best that the scores allow.

    Raises ValueError where the scores lack what it goes by.
    """
    elsewhere = asked is not None and asked not in get_args(Allocation) and asked in points(ALLOCATION_POINTS)
    if asked is not None and not elsewhere:
        check_choice("allocation", asked, Allocation)
    if ranking == "local":
        if asked is not None:
            raise ValueError(
                f"allocation={asked!r} says how groups share a budget, but a local ranking takes the same share of "
                "every group: ask for macs or params, or for ranking='global'"
            )
        return "uniform"
    damage, tried = (None, None) if isinstance(scores, np.ndarray) else (scores.damage, scores.sensitivities)
    if (asked == "gauss-newton" or elsewhere) and damage is None:
        raise ValueError(
            f"allocation={asked!r} needs scores with their damage: score with a loader and damage=True "
            "(or choose allocation='mean')"
        )
    if asked == "measured" and tried is None:
        raise ValueError(
            "allocation='measured' needs scores with their sensitivities: what measure_sensitivities gives, or a "
            "loader for score_and_prune"
        )
    return asked or ("mean" if damage is None else "gauss-newton")


def _curves(
    plan: Plan, of: Lattice, order: Ranking, scores: Scores | np.ndarray, used: str, kind: str
) -> Curves | None:
    """What each cluster's output loses, by kept levels; None where the budget isn't shared by that."""
    if isinstance(scores, np.ndarray) or used in ("mean", "uniform"):
        return None
    forecast = None
    if scores.damage is not None:
        damage = check_scores(plan, scores.damage)
        if (damage < 0).any():
            raise ValueError(
                f"{int((damage < 0).sum())} damages are below zero: they are squared changes of the output"
            )
        discount = kind == "params" and used != "measured"
        forecast = coherent_curves(order, discounted(plan, of, damage) if discount else damage)
    if used != "measured":
        return forecast
    assert scores.sensitivities is not None
    return measured_curves(of, scores.sensitivities, forecast)


def _on_allocation(
    plan: Plan, budget: Budget, ranking: str, asked: str | None, used: str, counts: np.ndarray
) -> list[str]:
    if used == "mean" and asked is None:
        return [
            "groups share the budget by scores divided by their group's mean, as there is no damage to go by: "
            "scores with a loader have one, and lose far less"
        ]
    share = plan.macs(counts) / max(plan.macs(), 1)
    if budget.kind == "ratio" and ranking == "local" and 0.01 <= share < 0.995:
        return [
            f"every group loses the same share; macs={share:.2g} asks for a model of the same MACs whose groups share "
            "the budget by what their loss does to the output, which is usually far better"
        ]
    return []


def _check_options(
    budget: Budget, ranking: str, round_to: int | None, norm_groups: NormGroups, rounding: str | None, max_ratio: float
) -> None:
    check_choice("ranking", ranking, RankingName)
    if round_to is not None and (isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1):
        raise ValueError(f"round_to={round_to!r}: give a number of channels, 1 or more (8 suits most hardware)")
    check_number("max_ratio", max_ratio)
    check_ratio("max_ratio", max_ratio)
    if rounding is not None:
        check_choice("rounding", rounding, Rounding)
    if rounding == "reference" and (budget.kind != "ratio" or ranking != "local" or norm_groups != "count"):
        raise ValueError(
            "rounding='reference' describes a local ratio with norm_groups='count'; "
            f"leave it out for {budget}, {ranking} ranking, norm_groups={norm_groups!r}"
        )


def _own_ratios(
    plan: Plan, of: Lattice, ratios: Mapping[str, float], ignore: Sequence[str]
) -> tuple[np.ndarray, list[str]]:
    """The ratio that patterns ask of each cluster, ``(n_clusters,)`` with NaN where none does, and what to note."""
    if isinstance(ignore, str):
        raise TypeError(f"ignore={ignore!r}: give a list of patterns, [{ignore!r}]")
    for pattern, value in ratios.items():
        check_number(f"ratios[{pattern!r}]", value)
        check_ratio(f"ratios[{pattern!r}]", value, none_allowed=True)
    own = np.full(len(plan.groups), np.nan)
    masks = match_groups(plan, list(ratios), "ratios")
    for mask, value in reversed(list(zip(masks, ratios.values(), strict=True))):
        own[mask] = value
    for mask in match_groups(plan, ignore, "ignore"):
        own[mask] = 0.0
    lowest = np.full(len(of.levels), np.inf)
    np.fmin.at(lowest, of.cluster, own)
    lowest[np.isinf(lowest)] = np.nan
    tied = lowest[of.cluster]
    differs = ~((own == tied) | (np.isnan(own) & np.isnan(tied)))
    notes = []
    if differs.any():
        notes.append(
            f"{named(plan, differs)} follow the ratio of groups that a constraint ties them to "
            f"(the smallest among them: {', '.join(sorted({f'{t:g}' for t in tied[differs]}))})"
        )
    return lowest, notes


def _by_ratio(of: Lattice, shares: np.ndarray, rounding: str | None) -> np.ndarray:
    chosen = np.empty(len(of.levels), np.int64)
    for c, (choices, q, share) in enumerate(zip(of.allowed, of.levels.tolist(), shares.tolist(), strict=True)):
        if rounding == "reference" and len(choices) > 1:
            step = int(choices[-1] - choices[-2])
            chosen[c] = max(q - step * int(share * (q // step)), choices[0])
        else:
            chosen[c] = search.nearest(choices, (1 - share) * q)
    return chosen


def _in_turn(
    plan: Plan,
    of: Lattice,
    order: Ranking,
    values: np.ndarray,
    budgets: Sequence[Budget],
    costs: Mapping[str, Cost],
    ranking: str,
    own: np.ndarray,
    max_ratio: float,
    curves_for: Callable[[str], Curves | None],
    used: str,
) -> np.ndarray:
    """Kept levels per cluster that meet all budgets: one after the other, each within what the one before left.

    Of both orders the one that damages less; the first, where there is no damage to go by.
    """
    found = []
    whole = curves_for("macs")
    for turns in [budgets, budgets[::-1]][: 1 if whole is None else len(budgets)]:
        most = of.levels
        for budget in turns:
            curves, cost = curves_for(budget.kind), costs.get(budget.kind)
            most = _by_search(plan, of, order, values, budget, cost, ranking, own, max_ratio, curves, most, used)
        found.append(most)
    if len(found) == 1 or whole is None:
        return found[0]
    return min(found, key=lambda chosen: sum(curve[level] for curve, level in zip(whole, chosen.tolist())))


def _by_search(
    plan: Plan,
    of: Lattice,
    order: Ranking,
    values: np.ndarray,
    budget: Budget,
    cost: Cost | None,
    ranking: str,
    own: np.ndarray,
    max_ratio: float,
    curves: Curves | None,
    most: np.ndarray,
    used: str,
) -> np.ndarray:
    """Kept levels per cluster that meet one budget, nowhere above ``most``."""
    choices = []
    for c, all_of_it in enumerate(of.allowed):
        if np.isnan(own[c]):
            choices.append(all_of_it[(all_of_it >= (1 - max_ratio) * of.levels[c] - 1e-9) & (all_of_it <= most[c])])
        else:
            choices.append(search.nearest(all_of_it, (1 - own[c]) * of.levels[c]).reshape(1))
    if ranking == "global":
        level_scores = order.level_scores(normalised(plan, values))
    else:  # a level's place in its cluster in place of its score: one threshold takes the same share everywhere
        starts = np.cumsum(of.levels) - of.levels
        level_scores = (np.arange(int(of.levels.sum())) - np.repeat(starts, of.levels) + 0.5) / np.repeat(
            of.levels, of.levels
        )
    free = np.isnan(own)[of.cluster] & np.array([len(c) > 1 for c in of.allowed], bool)[of.cluster]
    counted, whole, limit = _limit(plan, of, budget, cost, free)
    try:
        if curves is None:
            return search.meet(of, choices, level_scores, counted, limit)
        resource = Resource.of(plan, of, budget.kind, free) if cost is None else CostOfLevels(cost, of)
        if used in ("gauss-newton", "measured"):
            return allocate(choices, curves, resource, limit)
        return allocated_by(used, choices, curves, resource.at, limit)
    except search.Unreachable as e:
        raise BudgetError(unreachable(budget, whole, e.least, max_ratio, cost)) from None


def _limit(
    plan: Plan, of: Lattice, budget: Budget, cost: Cost | None, free: np.ndarray
) -> tuple[Callable[[np.ndarray], float], float, float]:
    """What a budget counts, as a function of kept counts; all there is, and how much may stay. Raises BudgetError."""
    if budget.kind == "ratio":
        whole = float(of.group_sizes[free].sum())
        return lambda counts: float(counts[free].sum()), whole, (1 - budget.value) * whole
    counted: Any = cost or (plan.params if budget.kind == "params" else plan.macs)
    whole = float(counted(plan.counts()))
    limit = budget.limit(whole)
    if limit >= whole:
        all_of_it = f"{int(whole):,} {UNITS[budget.kind]}" if cost is None else words_of(cost, whole)
        raise BudgetError(
            f"{budget} asks for nothing: {plan.model_class} has {all_of_it}; "
            "ask for fewer, or for a share between 0 and 1"
        )
    return lambda counts: float(counted(counts)), whole, limit
