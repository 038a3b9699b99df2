"""Which keep-sets a plan allows."""

from __future__ import annotations

import numpy as np
import pytest
from random_plans import chain

from diffprune_fast.plan import Constraint, violations
from diffprune_fast.plan.lattice import lattice

NORM = Constraint("norm", "norm", np.arange(16).reshape(4, 4))
STRADDLE = Constraint("norm", "norm", np.arange(24).reshape(4, 6))


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        ({"layer9": [0]}, "'layer9' is not in the plan"),
        ({"layer0": []}, "no unit stays"),
        ({"layer0": [1, 0]}, "not sorted"),
        ({"layer0": [0, 3, 3]}, "unit 3 is named twice"),
        ({"layer0": [0, 16]}, "don't fit into 0..15"),
        ({"layer0": [-1, 2]}, "don't fit into 0..15"),
        ({"layer0": [0.5, 1.0]}, "vector of integers"),
        ({"layer0": [[0], [4]]}, "vector of integers"),
    ],
)
def test_malformed_keep_sets_are_named(keep, says):
    (found,) = violations(chain([16, 8], []), {k: np.array(v) for k, v in keep.items()})
    assert says in found


def test_a_whole_keep_set_and_an_empty_one_are_fine():
    plan = chain([16, 8], [NORM, STRADDLE])
    assert violations(plan, {}, "exact") == []
    assert violations(plan, {"layer0": np.arange(16), "layer1": np.arange(8)}, "exact") == []


def test_norm_membership_counts_only_in_exact_mode():
    plan = chain([16, 8], [NORM])
    first_rows = {"layer0": np.arange(8)}
    assert violations(plan, first_rows, "count") == []
    (found,) = violations(plan, first_rows, "exact")
    assert "row 0 keeps 4 channels and row 2 keeps 0" in found
    (found,) = violations(plan, {"layer0": np.arange(6)}, "count")
    assert "6 channels stay, which 4 norm groups can't share" in found


@pytest.mark.parametrize("kind", ["heads", "chunk", "conv_groups"])
@pytest.mark.parametrize("norm_groups", ["count", "exact"])
def test_other_constraints_hold_in_both_modes(kind, norm_groups):
    plan = chain([16], [Constraint(kind, "here", np.arange(16).reshape(4, 4))])
    assert violations(plan, {"layer0": np.arange(8)}, norm_groups) != []
    assert violations(plan, {"layer0": np.array([0, 1, 4, 5, 8, 11, 12, 15])}, norm_groups) == []
    (found,) = violations(plan, {"layer0": np.array([0, 5, 10, 15])}, norm_groups)
    assert "at least 2 must stay" in found
    assert lattice(plan, norm_groups).allowed[0].tolist() == [2, 3, 4]


def test_a_channel_that_stays_counts():
    rows = np.array([[0, 1, -1, -1], [2, 3, 4, 5]])
    plan = chain([6], [Constraint("chunk", "here", rows)])
    assert violations(plan, {"layer0": np.array([2, 3])}, "count") == []
    assert violations(plan, {"layer0": np.array([0, 2, 3])}, "count") != []


def test_a_repeated_unit_counts_as_often_as_it_stands_there():
    plan = chain([4], [Constraint("chunk", "here", np.array([[0, 0], [1, 2]]))])
    assert violations(plan, {"layer0": np.array([0, 1, 2])}) == []
    assert violations(plan, {"layer0": np.array([0, 1, 3])}) != []


def test_rows_of_single_units_are_free():
    plan = chain([4], [Constraint("heads", "here", np.repeat(np.arange(4), 5).reshape(4, 5))])
    assert violations(plan, {"layer0": np.array([0, 2])}, "exact") == []
    assert lattice(plan).allowed[0].tolist() == [2, 3, 4]


def test_norm_rows_of_single_units_stay():
    """A norm keeps its number of groups: a group that went as a whole would be filled from others."""
    plan = chain([4], [Constraint("norm", "here", np.repeat(np.arange(4), 2).reshape(4, 2))])
    assert violations(plan, {"layer0": np.array([0, 2])}, "exact") != []
    of = lattice(plan, "exact")
    assert of.counts(np.array([c[0] for c in of.allowed]))[0] == 4
    assert len(of.allowed[0]) == 1


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="norm_groups='groups': choose one of 'count', 'exact'"):
        violations(chain([4], []), {}, "groups")


def test_lattice_of_a_norm_inside_a_group():
    of = lattice(chain([128, 256], [Constraint("norm", "n", np.arange(128).reshape(32, 4))]), "exact")
    assert of.levels.tolist() == [4, 256]
    assert of.counts(np.array([3, 179])).tolist() == [96, 179]


def test_lattice_of_a_norm_across_a_concat():
    norm = Constraint("norm", "n", np.arange(384).reshape(32, 12))
    exact = lattice(chain([128, 256], [norm]), "exact")
    assert exact.cluster.tolist() == [0, 0]
    assert exact.levels.tolist() == [4]
    count = lattice(chain([128, 256], [norm]), "count")
    assert [c.tolist() for c in count.allowed] == [[32, 64, 96, 128], list(range(32, 257, 32))]


def test_rounding_falls_back_where_it_leaves_no_choice():
    of = lattice(chain([64, 12, 7], []), round_to=8)
    assert [c.tolist() for c in of.allowed] == [list(range(8, 65, 8)), [8, 12], [4, 7]]
    assert of.rounded.tolist() == [8, 8, 4]


def test_rounding_counts_channels_and_not_units():
    of = lattice(chain([16], [], [4]), round_to=8)
    assert of.allowed[0].tolist() == list(range(2, 17, 2))


def test_unequal_rows_of_staying_channels_pin_the_groups():
    rows = np.concatenate([np.arange(12), np.full(4, -1)]).reshape(2, 8)
    plan = chain([12, 8], [Constraint("heads", "h", rows)])
    assert [len(c) for c in lattice(plan).allowed] == [1, 7]
