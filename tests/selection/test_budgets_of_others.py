"""Budgets and allocations of other packages, by their entry points."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from models import small_unet

from diffprune_fast import Plan, select, trace
from diffprune_fast.scoring.scores import Scores

MODULE = """
import numpy as np

def energy(plan):
    return lambda counts: (counts ** 2).sum(axis=-1)

def smallest(choices, curves, cost, limit):
    return np.array([c[0] for c in choices])

def whole(choices, curves, cost, limit):
    return np.array([c[-1] for c in choices])

def unheard(choices, curves, cost, limit):
    return np.array([c[-1] + 1 for c in choices])
"""
POINTS = """[diffprune_fast.budgets]
energy = somebodys_budgets:energy

[diffprune_fast.allocations]
smallest = somebodys_budgets:smallest
whole = somebodys_budgets:whole
unheard = somebodys_budgets:unheard
"""


@pytest.fixture(scope="module")
def plan() -> Plan:
    return trace(small_unet())


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "somebodys_budgets.py").write_text(MODULE)
    info = tmp_path / "somebodys_budgets-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys-budgets\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    monkeypatch.syspath_prepend(str(tmp_path))


def damaged(plan: Plan) -> Scores:
    values = np.random.default_rng(0).random(plan.n_units)
    return Scores(values, "none", "random", 0, damage=values)


def test_a_budget_by_its_name_is_met_beside_ours(plan: Plan) -> None:
    found = select(plan, damaged(plan), budgets={"energy": 0.4}, macs=0.7)
    counts = plan.counts(found.keep)
    assert (counts**2).sum() <= 0.4 * (plan.counts() ** 2).sum()
    assert plan.macs(counts) <= 0.7 * plan.macs()
    assert "energy=0.4" in found.asked
    assert "energy 0." in found.met


def test_an_allocation_by_its_name_chooses(plan: Plan) -> None:
    found = select(plan, damaged(plan), macs=0.5, allocation="smallest", max_ratio=0.5)
    assert found.allocation == "smallest"
    counts, whole = plan.counts(found.keep), plan.counts()
    assert ((counts >= 0.5 * whole) & (counts < 0.8 * whole)).all()


@pytest.mark.parametrize(("name", "message"), [
    ("whole", "'whole' chose what costs .* more than the limit"),
    ("unheard", "'unheard' chose levels that aren't among the choices"),
    ("nobodys", "allocation='nobodys': choose one of"),
])  # fmt: skip
def test_an_allocation_that_breaks_the_rules_is_refused(plan: Plan, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(plan, damaged(plan), macs=0.5, allocation=name)


def test_a_budget_that_nobody_counts_is_refused(plan: Plan) -> None:
    with pytest.raises(ValueError, match="noise= is counted by nothing here"):
        select(plan, damaged(plan), budgets={"noise": 0.5})
