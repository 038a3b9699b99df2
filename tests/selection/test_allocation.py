"""How groups share a budget: the arithmetic against the plan's own, the greedy walk against every choice there is."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_plans import chain, random_plan

from diffprune_fast.plan import Constraint, Cost, Extents, Group, Member, Plan, violations
from diffprune_fast.plan.lattice import lattice, rank_units
from diffprune_fast.scoring import Scores
from diffprune_fast.scoring.scores import Sensitivities
from diffprune_fast.selection import BudgetError, select
from diffprune_fast.selection.allocation import (
    EMBEDDING_DISCOUNT,
    Resource,
    allocate,
    coherent_curves,
    discounted,
    measured_curves,
)
from diffprune_fast.selection.search import Unreachable

seeds = st.integers(0, 10**6)
quick = settings(max_examples=60, deadline=None)


def scores_for(plan: Plan, seed: int = 0) -> Scores:
    """Damages that span decades between groups, as real ones do."""
    rng = np.random.default_rng(seed)
    level = np.repeat(10 ** rng.uniform(-6, 0, len(plan.groups)), np.diff(plan.offsets))
    return Scores(
        rng.lognormal(size=plan.n_units), "micro", "diff-pruning", 0, damage=level * rng.lognormal(size=plan.n_units)
    )


def cubic_plan(seed: int) -> Plan:
    """A random plan with an operation of three extents and a parameter of three prunable dims."""
    plan = random_plan(seed)
    assume(len(plan.groups) >= 3)
    sizes = [g.n_units for g in plan.groups]
    place = [(Member("cube", d, np.arange(sizes[d]).reshape(-1, 1))) for d in range(3)]
    groups = [Group(g.name, g.n_units, (*g.members, place[i])) if i < 3 else g for i, g in enumerate(plan.groups)]
    return dataclasses.replace(
        plan,
        groups=tuple(groups),
        shapes={**plan.shapes, "cube": tuple(sizes[:3]), "free": (3, 3)},
        costs=(*plan.costs, Cost("cube", 7, (0, 1, 2)), Cost("product", 3, (0, 1), attention=True)),
    )


def random_choice(rng: np.random.Generator, of) -> np.ndarray:
    return np.array([rng.choice(c) for c in of.allowed], np.int64)


# ----------------------------------------------------------------------------------------------------------------------
# Arithmetic


@quick
@given(seed=seeds, cubic=st.booleans(), kind=st.sampled_from(["macs", "params"]))
def test_costs_are_those_of_the_plan(seed, cubic, kind):
    plan = cubic_plan(seed) if cubic else random_plan(seed)
    of = lattice(plan, "count", 1)
    resource = Resource.of(plan, of, kind)
    rng = np.random.default_rng(seed)
    for chosen in (of.levels, random_choice(rng, of)):
        assert resource.at(chosen) == getattr(plan, kind)(of.counts(chosen))


@quick
@given(seed=seeds, cubic=st.booleans(), kind=st.sampled_from(["macs", "params", "ratio"]))
def test_changes_of_single_clusters_are_differences_of_costs(seed, cubic, kind):
    plan = cubic_plan(seed) if cubic else random_plan(seed)
    of = lattice(plan, "count", 1)
    resource = Resource.of(plan, of, kind)
    rng = np.random.default_rng(seed)
    chosen = random_choice(rng, of)
    cluster = rng.integers(0, len(chosen), 20)
    then = np.array([rng.choice(of.allowed[c]) for c in cluster])
    found = resource.change(chosen, resource.slope(chosen), cluster, then - chosen[cluster])
    for c, level, change in zip(cluster, then, found, strict=True):
        other = chosen.copy()
        other[c] = level
        assert change == resource.at(other) - resource.at(chosen)


def test_the_cost_of_units_counts_the_groups_that_are_counted():
    plan = chain([8, 6, 4], [])
    of = lattice(plan)
    resource = Resource.of(plan, of, "ratio", np.array([True, False, True]))
    assert resource.at(of.levels) == 12


def test_damages_of_one_cluster_add_in_amplitude():
    plan = chain([4, 3], [])
    of = lattice(plan)
    order = rank_units(of, np.array([4.0, 3, 2, 1, 1, 2, 3]), "independent")
    curves = coherent_curves(order, np.array([9.0, 4, 4, 1, 0, 0, 25]))
    assert curves[of.cluster[0]].tolist() == [64, 25, 9, 1, 0]
    assert curves[of.cluster[1]].tolist() == [25, 0, 0, 0]


def test_groups_that_a_constraint_ties_share_one_curve():
    plan = chain([4, 4], [Constraint("heads", "h", np.arange(8).reshape(2, 4))])
    of = lattice(plan)
    assert len(of.levels) == 1
    curves = coherent_curves(rank_units(of, np.tile(np.arange(4.0), 2), "independent"), np.ones(8))
    assert curves[0].tolist() == [64, 36, 16, 4, 0]


# ----------------------------------------------------------------------------------------------------------------------
# The walk


def everything(of, curves, resource, limit):
    """The least damage of all choices within the limit, by trying them."""
    best = np.inf
    for chosen in itertools.product(*of.allowed):
        if resource.at(np.array(chosen)) <= limit:
            best = min(best, sum(curve[j] for curve, j in zip(curves, chosen, strict=True)))
    return best


@quick
@given(seed=seeds, share=st.floats(0.15, 0.9))
def test_little_more_damage_than_the_best_of_all_choices(seed, share):
    rng = np.random.default_rng(seed)
    plan = chain([int(w) for w in rng.choice([8, 12, 16], 3)], [])
    of = lattice(plan)
    scores = scores_for(plan, seed)
    curves = coherent_curves(rank_units(of, scores.damage, "independent"), scores.damage)
    resource = Resource.of(plan, of, "macs")
    limit = share * resource.at(of.levels)
    best = everything(of, curves, resource, limit)
    assume(np.isfinite(best))
    chosen = allocate(of.allowed, curves, resource, limit)
    found = sum(curve[j] for curve, j in zip(curves, chosen, strict=True))
    assert resource.at(chosen) <= limit
    assert best - 1e-12 <= found <= 2 * best + 1e-12


def test_one_cluster_is_cut_exactly_as_far_as_it_must():
    plan = chain([20], [])
    of = lattice(plan)
    curves = coherent_curves(rank_units(of, np.arange(20.0), "independent"), np.ones(20))
    resource = Resource.of(plan, of, "macs")
    assert allocate(of.allowed, curves, resource, resource.at(np.array([13]))).tolist() == [13]
    assert allocate(of.allowed, curves, resource, resource.at(np.array([13])) - 1).tolist() == [12]


def test_looks_past_a_first_step_that_is_dear():
    """Group 0's first unit costs 9 and all others nothing; group 1 costs 2 a unit, summed in amplitude."""
    plan = chain([8, 8], [])
    of = lattice(plan)
    curves = [np.r_[np.full(8, 9.0), 0.0], (2.0 * np.arange(8, -1, -1)) ** 2]
    resource = Resource(np.array([1.0, 1.0]), np.array([[0], [1]]), np.array([0.0, 0, 1]), np.eye(3)[:, :2])
    assert allocate(of.allowed, curves, resource, 9.0).tolist() == [2, 7]


def test_what_overshoots_comes_back():
    """The coarse cluster's only step frees more than was asked: the fine one, that had gone first, is whole again."""
    choices = [np.array([2, 10]), np.arange(1, 5)]
    curves = [np.r_[np.zeros(2), np.full(8, 3.0), 0.0], np.array([0, 3.0, 1.0, 0.1, 0.0])]
    resource = Resource(np.array([1.0, 1.0]), np.array([[0], [1]]), np.array([0.0, 0, 1]), np.eye(3)[:, :2])
    assert allocate(choices, curves, resource, 8.0).tolist() == [2, 4]


@quick
@given(seed=seeds, a=st.floats(0.1, 0.95), b=st.floats(0.1, 0.95), kind=st.sampled_from(["macs", "params"]))
def test_a_smaller_limit_never_costs_more(seed, a, b, kind):
    plan = random_plan(seed)
    of = lattice(plan, "count", 1)
    scores = scores_for(plan, seed)
    curves = coherent_curves(rank_units(of, scores.values, "independent"), scores.damage)
    resource = Resource.of(plan, of, kind)
    try:
        small, large = (allocate(of.allowed, curves, resource, s * resource.at(of.levels)) for s in sorted([a, b]))
    except Unreachable:
        assume(False)
    assert resource.at(small) <= resource.at(large)


@quick
@given(seed=seeds, share=st.floats(0.1, 0.95))
def test_no_single_step_more_would_fit(seed, share):
    plan = random_plan(seed)
    of = lattice(plan, "count", 1)
    scores = scores_for(plan, seed)
    curves = coherent_curves(rank_units(of, scores.values, "independent"), scores.damage)
    resource = Resource.of(plan, of, "macs")
    limit = share * resource.at(of.levels)
    try:
        chosen = allocate(of.allowed, curves, resource, limit)
    except Unreachable:
        assume(False)
    for c, some in enumerate(of.allowed):
        for level in some[some > chosen[c]][:1]:
            more = chosen.copy()
            more[c] = level
            assert resource.at(more) > limit


def test_units_without_damage_go_first_and_as_far_as_it_serves():
    plan = chain([32, 32], [])
    damage = np.r_[np.zeros(32), np.ones(32)]
    got = select(plan, Scores(np.ones(64), "micro", "diff-pruning", 0, damage=damage), macs=0.5, round_to=1)
    assert [len(k) for k in got.keep.values()][1] == 32


# ----------------------------------------------------------------------------------------------------------------------
# In select


@quick
@given(
    seed=seeds,
    budget=st.sampled_from(["params", "macs"]),
    share=st.floats(0.05, 0.95),
    norm_groups=st.sampled_from(["count", "exact"]),
    round_to=st.sampled_from([None, 4, 8]),
    cubic=st.booleans(),
)
def test_every_selection_holds_its_constraints_and_its_budget(seed, budget, share, norm_groups, round_to, cubic):
    plan = cubic_plan(seed) if cubic else random_plan(seed)
    try:
        got = select(plan, scores_for(plan, seed), **{budget: share}, norm_groups=norm_groups, round_to=round_to)
        again = select(plan, scores_for(plan, seed), **{budget: share}, norm_groups=norm_groups, round_to=round_to)
    except BudgetError:
        assume(False)
    assert got.allocation == "gauss-newton"
    assert violations(plan, got.keep, norm_groups) == []
    assert getattr(plan, budget)(got.keep) <= share * getattr(plan, budget)()
    assert all(np.array_equal(got.keep[n], again.keep[n]) for n in got.keep)


def test_a_global_ratio_is_shared_by_damage_too():
    plan = chain([64, 64], [])
    damage = np.repeat([1.0, 1e-4], 64)
    got = select(plan, Scores(np.ones(128), "micro", "diff-pruning", 0, damage=damage), ratio=0.25, ranking="global")
    assert [len(k) for k in got.keep.values()] == [64, 32]
    assert got.allocation == "gauss-newton"


def test_the_criterion_orders_units_and_the_damage_shares_the_budget():
    plan = chain([32, 32], [])
    values = np.r_[np.arange(32.0), np.arange(32.0)[::-1]]
    damage = np.r_[np.full(32, 1e-6), np.arange(32.0) + 1]  # group 1's dearest units have the lowest scores
    got = select(plan, Scores(values, "micro", "diff-pruning", 0, damage=damage), macs=0.6, round_to=1)
    first, second = got.keep.values()
    assert first.tolist() == list(range(32 - len(first), 32))
    assert len(second) == 32


def test_shares_of_ones_own_and_ignored_groups_stand():
    plan = chain([64, 64, 64], [])
    got = select(plan, scores_for(plan), macs=0.5, ratios={"layer0": 0.25}, ignore=["layer2"])
    kept = [len(k) for k in got.keep.values()]
    assert (kept[0], kept[2]) == (48, 64)
    assert kept[1] < 64


def test_a_budget_out_of_reach_says_how_far_one_gets():
    plan = chain([16], [])
    with pytest.raises(BudgetError, match="one gets down to 160 of 1,280 MACs"):
        select(plan, scores_for(plan), macs=0.01, round_to=1)


def test_scores_without_damage_are_shared_by_their_means_and_it_is_said():
    plan = chain([32, 32], [])
    got = select(plan, scores_for(plan).values, macs=0.5)
    assert got.allocation == "mean"
    assert any("no damage to go by" in note for note in got.notes)
    asked = select(plan, scores_for(plan), macs=0.5, allocation="mean")
    assert asked.allocation == "mean"
    assert asked.notes == ()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"allocation": "gauss-newton", "macs": 0.5}, "score with a loader and damage=True"),
        ({"allocation": "measured", "macs": 0.5}, "what measure_sensitivities gives"),
        ({"allocation": "best", "macs": 0.5}, "choose one of 'gauss-newton', 'measured', 'mean'"),
        ({"allocation": "mean"}, "a local ranking takes the same share of every group"),
    ],
)
def test_wrong_options_say_what_to_do(options, says):
    plan = chain([32], [])
    with pytest.raises(ValueError, match=says):
        select(plan, scores_for(plan).values, **options)


@pytest.mark.parametrize(("bad", "says"), [(-1.0, "below zero"), (np.nan, "NaN or infinite")])
def test_a_damage_that_is_none_is_refused(bad, says):
    plan = chain([32], [])
    scores = scores_for(plan)
    scores.damage[3] = bad
    with pytest.raises(ValueError, match=says):
        select(plan, scores, macs=0.5)


def test_a_ratio_names_the_budget_of_the_same_macs():
    plan = chain([64, 64], [])
    got = select(plan, scores_for(plan), ratio=0.5)
    share = plan.macs(got.keep) / plan.macs()
    assert any(f"macs={share:.2g} asks for" in note for note in got.notes)
    assert got.allocation == "uniform"


# ----------------------------------------------------------------------------------------------------------------------
# Measured curves


def tried(plan: Plan, shares, damage) -> Scores:
    sensitivities = Sensitivities(np.array(shares, float), np.array(damage, float))
    return dataclasses.replace(scores_for(plan), sensitivities=sensitivities)


def test_a_curve_goes_through_its_points_and_is_nothing_where_all_stays():
    plan = chain([8], [])
    (curve,) = measured_curves(lattice(plan), Sensitivities(np.array([[0.25, 0.5, 0.75]]), np.array([[1.0, 2, 50]])))
    assert curve[8] == 0
    np.testing.assert_allclose(curve[[6, 4, 2]], [1, 2, 50], rtol=1e-6)
    assert (np.diff(curve) <= 0).all()


def test_a_forecast_that_is_right_but_for_its_unit_stands():
    plan = chain([12], [])
    scores = scores_for(plan)
    of = lattice(plan)
    (forecast,) = coherent_curves(rank_units(of, scores.values, "independent"), scores.damage)
    (curve,) = measured_curves(of, Sensitivities(np.array([[0.25, 0.75]]), 7 * forecast[[[9, 3]]]), [forecast])
    np.testing.assert_allclose(curve, 7 * forecast)


def test_a_forecast_of_nothing_gives_way_to_what_was_measured():
    plan = chain([8], [])
    (curve,) = measured_curves(lattice(plan), Sensitivities(np.array([[0.5]]), np.array([[3.0]])), [np.zeros(9)])
    assert curve[4] == pytest.approx(3)
    assert curve[8] == 0


def test_trials_that_contradict_one_another_give_a_curve_that_never_falls():
    plan = chain([8], [])
    (curve,) = measured_curves(lattice(plan), Sensitivities(np.array([[0.25, 0.5, 0.75]]), np.array([[3.0, 1, 4]])))
    assert (np.diff(curve) <= 0).all()
    assert curve[6] == pytest.approx(3)


def test_a_group_without_trials_costs_nothing():
    plan = chain([8, 8], [])
    found = Sensitivities(np.array([[np.nan, np.nan], [0.5, np.nan]]), np.array([[np.nan, np.nan], [4.0, np.nan]]))
    first, second = measured_curves(lattice(plan), found)
    assert not first.any()
    assert second[4] == pytest.approx(4)


def test_what_was_measured_shares_the_budget_in_place_of_the_damage():
    plan = chain([64, 64], [])
    scores = dataclasses.replace(tried(plan, [[0.5], [0.5]], [[1.0], [1e-4]]), damage=np.repeat([1e-4, 1.0], 64))
    got = select(plan, scores, ratio=0.25, ranking="global", allocation="measured")
    assert [len(k) for k in got.keep.values()] == [64, 32]
    assert got.allocation == "measured"


# ----------------------------------------------------------------------------------------------------------------------
# Time embeddings


def with_embedding() -> Plan:
    """Two groups of 64: the first is read at 100 positions, the second once in a sample."""
    plan = chain([64, 64], [])
    extents = Extents(np.zeros(2, np.int64), np.eye(2, dtype=np.int64))
    groups = tuple(Group(n, 64, (Member(f"{n}.weight", 1, np.arange(64).reshape(-1, 1)),)) for n in ("image", "time"))
    return dataclasses.replace(
        plan,
        groups=groups,
        shapes={"image.weight": (32, 64), "time.weight": (32, 64)},
        costs=(Cost("image", 3200, (0,)), Cost("time", 32, (1,))),
        extents=extents,
    )


def test_units_of_a_time_embedding_are_counted_at_a_discount():
    plan = with_embedding()
    found = discounted(plan, lattice(plan), np.ones(128))
    assert found.tolist() == [1.0] * 64 + [EMBEDDING_DISCOUNT] * 64


def test_the_discount_is_for_parameters_only():
    plan = with_embedding()
    scores = Scores(np.ones(128), "micro", "diff-pruning", 0, damage=np.repeat([1.0, 1.5], 64))
    by_params = {n: len(k) for n, k in select(plan, scores, params=0.75).keep.items()}
    by_macs = {n: len(k) for n, k in select(plan, scores, macs=0.75).keep.items()}
    assert by_params["time"] < by_params["image"]
    assert by_macs["time"] == 64
