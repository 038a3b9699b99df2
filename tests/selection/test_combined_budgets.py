"""Budgets of parameters and of MACs at once."""

from __future__ import annotations

import numpy as np
import pytest
from models import small_unet

from diffprune_fast import Plan, trace
from diffprune_fast.scoring.scores import Scores
from diffprune_fast.selection.select import select


@pytest.fixture(scope="module")
def plan() -> Plan:
    return trace(small_unet())


@pytest.mark.parametrize("damage", [True, False])
@pytest.mark.parametrize(("macs", "params"), [(0.5, 0.9), (0.9, 0.5), (0.6, 0.6)])
def test_both_are_met_and_one_of_them_closely(plan: Plan, macs: float, params: float, damage: bool) -> None:
    values = np.random.default_rng(0).random(plan.n_units)
    scores = Scores(values, "none", "random", 0, damage=values if damage else None)
    found = select(plan, scores, macs=macs, params=params, round_to=1)
    slack = [macs - plan.macs(found.keep) / plan.macs(), params - plan.params(found.keep) / plan.params()]
    assert min(slack) >= 0
    assert min(slack) < 0.03
    assert "macs=" in found.asked
    assert "params=" in found.asked


def test_a_ratio_stands_alone(plan: Plan) -> None:
    with pytest.raises(ValueError, match=r"give one budget, not 2 \(all others can be combined\)"):
        select(plan, np.random.default_rng(0).random(plan.n_units), ratio=0.3, macs=0.5)
