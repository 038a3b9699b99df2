"""Which timesteps count, and how they are drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffprune_fast.objective.randomness import stratified
from diffprune_fast.plan import Group, Plan
from diffprune_fast.scoring.scores import LossCurve, keep_set_agreement
from diffprune_fast.scoring.timesteps import curve_timesteps, quad_cells


def test_the_curve_starts_at_zero_ends_at_the_last_and_is_dense_at_zero() -> None:
    t = curve_timesteps(1000)
    assert len(t) == 20
    assert t[0] == 0
    assert t[-1] == 999
    assert (np.diff(np.diff(t)) >= -1).all()


def test_the_threshold_set_is_where_the_interpolated_loss_is_above() -> None:
    curve = LossCurve(np.array([0, 10, 20, 30]), np.array([2.0, 1.0, 0.1, 0.02]), threshold=0.05)
    # between 20 (0.05 of the maximum, not above it) and 10 (0.5) everything below 20 is above the threshold
    assert curve.kept_timesteps.tolist() == list(range(20))
    assert curve.kept == (0, 19)
    np.testing.assert_allclose(curve.relative, [1, 0.5, 0.05, 0.01])


def test_a_loss_that_rises_again_gives_a_set_with_a_gap() -> None:
    curve = LossCurve(np.array([0, 2, 4, 6]), np.array([1.0, 0.0, 0.0, 1.0]), threshold=0.4)
    assert curve.kept_timesteps.tolist() == [0, 1, 5, 6]


def test_one_timestep_is_drawn_from_each_stratum() -> None:
    allowed = np.concatenate([np.arange(100), np.arange(500, 600)])
    for seed in range(5):
        t = stratified(allowed, 20, torch.Generator().manual_seed(seed))
        where = np.searchsorted(allowed, np.sort(t.numpy()))
        assert (where // 10 == np.arange(20)).all()
        assert (allowed[where] == np.sort(t.numpy())).all()


def test_strata_are_shuffled_among_the_samples() -> None:
    t = stratified(np.arange(1000), 64, torch.Generator().manual_seed(0))
    assert not torch.equal(t, t.sort().values)


@pytest.mark.parametrize("n", [1, 2, 7, 50, 1000])
def test_quad_cells_cover_every_timestep_once_and_hold_their_own_timestep(n: int) -> None:
    cells = quad_cells(n)
    assert [t for c in cells for t in range(c.start, c.stop)] == list(range(n))
    assert all(c.start <= c.timestep < c.stop for c in cells)
    assert cells[0].timestep == 0
    assert sum(c.width for c in cells) == n


def test_quad_cells_below_470_are_about_85() -> None:
    assert 80 <= sum(c.timestep < 470 for c in quad_cells(1000)) <= 91


def hand_plan(*sizes: int) -> Plan:
    return Plan("Hand", tuple(Group(f"g{i}", n, ()) for i, n in enumerate(sizes)), (), {}, {})


def test_agreement_is_the_jaccard_index_of_the_kept_units() -> None:
    plan = hand_plan(4, 4)
    a = np.array([0, 1, 2, 3, 0, 1, 2, 3.0])
    b = np.array([3, 2, 1, 0, 0, 1, 2, 3.0])
    # at a half: group 0 keeps {2, 3} against {0, 1}, group 1 the same two
    assert keep_set_agreement(plan, a, b, 0.5) == pytest.approx(2 / 6)
    assert keep_set_agreement(plan, a, 5 * a + 1, 0.5) == 1.0


def test_agreement_of_random_scores_at_ratio_030_is_what_the_docs_say() -> None:
    rng = np.random.default_rng(0)
    plan = hand_plan(20000)
    assert keep_set_agreement(plan, rng.random(20000), rng.random(20000), 0.3) == pytest.approx(0.54, abs=0.01)
