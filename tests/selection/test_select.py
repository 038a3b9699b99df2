"""Budgets, rankings and the keep-sets that come of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_plans import chain, random_plan

from diffprune_fast.plan import Constraint, Plan, violations
from diffprune_fast.selection import BudgetError, parse_budget, select

seeds = st.integers(0, 10**6)
quick = settings(max_examples=60, deadline=None)


def scores_for(plan, seed=0):
    return np.random.default_rng(seed).lognormal(size=plan.n_units)


def total_kept(selection):
    return sum(len(k) for k in selection.keep.values())


@quick
@given(
    seed=seeds,
    budget=st.sampled_from(["ratio", "params", "macs"]),
    share=st.floats(0.05, 0.95),
    ranking=st.sampled_from([None, "local", "global"]),
    norm_groups=st.sampled_from(["count", "exact"]),
    offsets=st.sampled_from(["same", "independent"]),
    round_to=st.sampled_from([None, 1, 4, 8]),
)
def test_every_selection_holds_its_constraints_and_its_budget(
    seed, budget, share, ranking, norm_groups, offsets, round_to
):
    plan = random_plan(seed)
    try:
        got = select(
            plan,
            scores_for(plan, seed),
            **{budget: share},
            ranking=ranking,
            norm_groups=norm_groups,
            offsets=offsets,
            round_to=round_to,
        )
    except BudgetError:
        assume(False)
    assert violations(plan, got.keep, norm_groups) == []
    assert list(got.keep) == [g.name for g in plan.groups]
    assert all(k.dtype == np.int64 for k in got.keep.values())
    if budget == "params":
        assert plan.params(got.keep) <= share * plan.params()
    if budget == "macs":
        assert plan.macs(got.keep) <= share * plan.macs()


@quick
@given(seed=seeds, ranking=st.sampled_from(["local", "global"]), a=st.floats(0.1, 0.9), b=st.floats(0.1, 0.9))
def test_a_smaller_budget_never_costs_more(seed, ranking, a, b):
    plan = random_plan(seed)
    assume(a != b)
    try:
        small, large = (select(plan, scores_for(plan), macs=m, ranking=ranking) for m in sorted([a, b]))
    except BudgetError:
        assume(False)
    assert plan.macs(small.keep) <= plan.macs(large.keep)


@quick
@given(seed=seeds, share=st.floats(0.2, 0.8))
def test_no_single_step_more_would_fit_the_budget(seed, share):
    plan = dataclasses.replace(random_plan(seed), constraints=())
    try:
        got = select(plan, scores_for(plan), macs=share, round_to=1)
    except BudgetError:
        assume(False)
    counts = plan.counts(got.keep)
    for g in range(len(counts)):
        if counts[g] < plan.groups[g].n_units:
            more = counts.copy()
            more[g] += 1
            assert plan.macs(more) > share * plan.macs()


@quick
@given(seed=seeds, share=st.floats(0.1, 0.9))
def test_same_blocks_keep_the_same_offsets(seed, share):
    norm = Constraint("norm", "n", np.arange(64).reshape(8, 8))
    plan = chain([64, 24], [norm])
    keep = select(plan, scores_for(plan, seed), ratio=share, round_to=1, offsets="same").keep["layer0"]
    offsets = [set(keep[keep // 8 == row] % 8) for row in range(8)]
    assert all(o == offsets[0] for o in offsets)


def test_independent_blocks_choose_their_own():
    plan = chain([8], [Constraint("norm", "n", np.arange(8).reshape(2, 4))])
    scores = np.array([9.0, 8, 1, 1, 1, 1, 8, 9])
    own = select(plan, scores, ratio=0.5, round_to=1, offsets="independent")
    assert own.keep["layer0"].tolist() == [0, 1, 6, 7]
    same = select(plan, np.array([9.0, 8, 1, 1, 1, 2, 1, 1]), ratio=0.5, round_to=1)
    assert same.keep["layer0"].tolist() == [0, 1, 4, 5]


def test_the_lowest_scores_go_first():
    plan = chain([10], [])
    scores = np.array([5.0, 0, 9, 1, 8, 2, 7, 3, 6, 4])
    assert select(plan, scores, ratio=0.4, round_to=1).keep["layer0"].tolist() == [0, 2, 4, 6, 8, 9]


def test_global_ranking_compares_groups_by_their_own_mean():
    plan = chain([32, 32], [])
    flat, peaked = np.full(32, 1e-6), np.r_[np.full(8, 4.0), np.zeros(24)]
    got = select(plan, np.r_[flat, peaked], ratio=0.3, ranking="global", round_to=1)
    assert len(got.keep["layer0"]) == 32
    assert got.keep["layer1"].size < 16
    assert set(range(8)) <= set(got.keep["layer1"].tolist())


def test_nothing_asked_is_ratio_three_tenths():
    plan = chain([80, 40], [])
    got = select(plan, scores_for(plan))
    assert [len(k) for k in got.keep.values()] == [56, 32]  # 28 is halfway between two multiples of 8: the larger
    assert got.ranking == "local"
    assert got.asked == "ratio=0.3 of the units"


def test_absolute_budgets_are_numbers_of_parameters_and_macs():
    plan = chain([64, 64], [])
    for kind, whole in (("params", plan.params), ("macs", plan.macs)):
        limit = int(0.6 * whole())
        absolute = select(plan, scores_for(plan), **{kind: limit})
        assert whole(absolute.keep) <= limit
        assert f"{limit:,}" in absolute.asked


def test_reference_rounding_truncates_per_norm_group_and_ignores_round_to():
    norms = [
        Constraint("norm", "n0", np.arange(128).reshape(32, 4)),
        Constraint("norm", "n1", np.arange(384).reshape(32, 12)),
    ]
    plan = chain([128, 256, 256], norms)
    got = select(plan, scores_for(plan), ratio=0.3, rounding="reference")
    assert [len(k) for k in got.keep.values()] == [96, 192, 180]


def test_reference_rounding_leaves_two_units():
    got = select(chain([4, 64], []), np.ones(68), ratio=0.9, rounding="reference")
    assert [len(k) for k in got.keep.values()] == [2, 7]
    assert violations(chain([4, 64], []), got.keep) == []


def test_ratios_and_ignore_go_by_name_pattern():
    plan = chain([64, 64, 64, 64], [])
    got = select(plan, scores_for(plan), ratio=0.5, ratios={"layer0": 0.25, "layer[01]*": 0.75}, ignore=["layer3.*"])
    # layer3.weight belongs to the groups layer2 (its inputs) and layer3 (its outputs)
    assert [len(k) for k in got.keep.values()] == [48, 16, 64, 64]


def test_ignored_groups_stay_whole_under_a_budget():
    plan = chain([64, 64, 64], [])
    got = select(plan, scores_for(plan), macs=0.6, ignore=["layer0"])
    assert len(got.keep["layer0"]) == 64
    assert plan.macs(got.keep) <= 0.6 * plan.macs()


def test_groups_tied_to_an_ignored_one_stay_whole_and_are_noted():
    tie = Constraint("chunk", "t", np.arange(32).reshape(2, 16))
    got = select(chain([16, 16, 64], [tie]), np.ones(96), ratio=0.5, ignore=["layer0"])
    assert [len(k) for k in got.keep.values()] == [16, 16, 32]
    assert any("ties" in note and "layer1" in note for note in got.notes)


def test_what_rounding_changes_is_noted():
    got = select(chain([16], []), np.ones(16), ratio=0.3)
    assert any("instead of 30.0%" in note and "round_to=8" in note for note in got.notes)
    got = select(chain([7, 64], []), np.ones(71), ratio=0.3)
    assert any("multiples of 4, not of 8" in note and "layer0" in note for note in got.notes)


def test_a_global_ranking_never_empties_a_group():
    plan = chain([100, 100], [])
    got = select(plan, np.r_[np.full(99, 1e-9), 1.0, np.full(100, 1.0)], ratio=0.5, ranking="global", round_to=1)
    assert len(got.keep["layer0"]) == 10
    got = select(plan, np.ones(200), ratio=0.5, ranking="global", round_to=1, max_ratio=0.6)
    assert min(len(k) for k in got.keep.values()) >= 40


@pytest.mark.parametrize("value", [0, 0.0, 1, 1.0, 1.5, -0.3, float("nan"), float("inf")])
def test_ratios_out_of_range_are_refused(value):
    with pytest.raises(ValueError, match=r"the share of units to remove must be 0 < ratio < 1"):
        select(chain([16], []), np.ones(16), ratio=value)


@pytest.mark.parametrize("name", ["params", "macs"])
@pytest.mark.parametrize("value", [0, -1, 1, 1.0, float("nan"), float("inf")])
def test_budgets_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}=.*the share that stays, between 0 and 1"):
        select(chain([16], []), np.ones(16), **{name: value})


@pytest.mark.parametrize("value", ["0.3", True, [0.3]])
def test_a_budget_must_be_a_number(value):
    with pytest.raises(TypeError, match="ratio must be a number"):
        select(chain([16], []), np.ones(16), ratio=value)


def test_two_budgets_at_once_are_refused():
    with pytest.raises(ValueError, match=r"ratio=0.3 and macs=0.5: give one budget, not 2"):
        select(chain([16], []), np.ones(16), ratio=0.3, macs=0.5)


def test_an_unknown_budget_is_named_with_the_nearest_one():
    with pytest.raises(TypeError, match=r"'mac' is not a budget \(did you mean 'macs'\?\)"):
        parse_budget({"mac": 0.5})


def test_an_unreachable_budget_says_how_far_one_gets():
    plan = chain([64, 64], [])
    with pytest.raises(BudgetError, match=r"macs=0.001 can't be met.*gets down to ([\d,]+) of") as e:
        select(plan, np.ones(128), macs=0.001)
    least = int(str(e.value).split("down to ")[1].split(" of")[0].replace(",", ""))
    got = select(plan, np.ones(128), macs=least)
    assert plan.macs(got.keep) == least


def test_a_budget_above_the_model_is_refused():
    with pytest.raises(BudgetError, match=r"asks for nothing: Chain has"):
        select(chain([64], []), np.ones(64), params=10**9)


def test_a_ratio_too_small_to_remove_anything_is_refused():
    plan = chain([16], [Constraint("norm", "n", np.arange(16).reshape(8, 2))])
    with pytest.raises(BudgetError, match=r"ratio=0.1 removes nothing: the finest step .* removes 0.500"):
        select(plan, np.ones(16), ratio=0.1)


def test_a_plan_without_a_choice_is_refused():
    with pytest.raises(BudgetError, match="no group of Chain may be pruned"):
        select(chain([1], []), np.ones(1), ratio=0.5)
    with pytest.raises(BudgetError, match="ignore names all"):
        select(chain([16], []), np.ones(16), macs=0.5, ignore=["*"])


def test_a_plan_without_groups_says_why_everything_stays():
    plan = Plan("Sealed", (), (), {"conv.weight:0": "is an output of the model"}, {"conv.weight": (3, 3)})
    with pytest.raises(BudgetError, match=r"everything is frozen: is an output of the model"):
        select(plan, np.zeros(0), ratio=0.3)


def test_scores_that_are_not_finite_name_their_group():
    plan = chain([16, 16], [])
    scores = np.ones(32)
    scores[20] = np.nan
    with pytest.raises(ValueError, match=r"1 of 32 scores are NaN or infinite \(groups layer1\)"):
        select(plan, scores, ratio=0.3)


def test_scores_of_another_plan_are_refused():
    with pytest.raises(ValueError, match=r"shape \(31,\), the plan of Chain has 32 units"):
        select(chain([32], []), np.ones(31), ratio=0.3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ranking": "gobal"}, "choose one of 'local', 'global'"),
        ({"offsets": "different"}, "choose one of 'independent', 'same'"),
        ({"norm_groups": "both"}, "choose one of"),
        ({"rounding": "up"}, "choose one of 'reference'"),
        ({"rounding": "reference", "norm_groups": "exact"}, "describes a local ratio"),
        ({"round_to": 0}, "give a number of channels"),
        ({"max_ratio": 1}, "max_ratio"),
        ({"ignore": ["layer7*"]}, "matches no group"),
        ({"ratios": {"layer0": 1.0}}, r"0 <= ratios\['layer0'\] < 1"),
    ],
)
def test_wrong_options_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        select(chain([32, 32], []), np.ones(64), **options)


def test_a_single_pattern_in_place_of_a_list_is_refused():
    with pytest.raises(TypeError, match=r"give a list of patterns, \['layer0'\]"):
        select(chain([32, 32], []), np.ones(64), ignore="layer0")


def test_selection_does_not_depend_on_the_call():
    plan = random_plan(7)
    one, two = (select(plan, scores_for(plan), ratio=0.4, ranking="global") for _ in range(2))
    assert all(np.array_equal(one.keep[k], two.keep[k]) for k in one.keep)
