"""Seconds of a forward from operations' seconds, by a clock that calculates them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from calculated_clock import RATE, CalculatedClock, macs_of
from models import small_unet
from torch import nn

from diffprune_fast import Plan, select, trace
from diffprune_fast.footprint import Times, measure_times
from diffprune_fast.footprint.recording import Operation
from diffprune_fast.footprint.replay import ready, tensor
from diffprune_fast.plan.lattice import lattice
from diffprune_fast.scoring.scores import Scores
from diffprune_fast.selection.budgets import BudgetError
from diffprune_fast.selection.costs import CostOfLevels


@pytest.fixture(scope="module")
def plan() -> Plan:
    return trace(small_unet())


def times(clock: CalculatedClock, plan: Plan) -> Times:
    return measure_times(small_unet(), plan, round_to=8, cache=None, clock=clock)


def random_counts(plan: Plan, n: int, least: float = 0.3) -> np.ndarray:
    of, rng = lattice(plan, "count", 8), np.random.default_rng(0)
    chosen = [[rng.choice(c[c >= least * c[-1]]) for c in of.allowed] for _ in range(n)]
    return of.counts(np.array(chosen))


def damaged(plan: Plan) -> Scores:
    values = np.random.default_rng(1).random(plan.n_units)
    return Scores(values, "none", "random", 0, damage=values)


def test_seconds_that_follow_the_macs_come_out_as_the_macs(plan: Plan) -> None:
    found = times(CalculatedClock(fixed=2e-3), plan)
    counts = random_counts(plan, 20)
    np.testing.assert_allclose(found(counts), [2e-3 + RATE * plan.macs(c) for c in counts], rtol=1e-6)
    assert found.fixed == pytest.approx(2e-3)


def test_changes_are_differences_also_after_a_step(plan: Plan) -> None:
    found = times(CalculatedClock(lambda operation: 1e-9 * macs_of(operation) ** 1.2), plan)
    of = lattice(plan, "count", 8)
    in_levels, chosen = CostOfLevels(found, of), of.levels.copy()
    cluster = np.repeat(np.arange(len(of.levels)), [len(c) for c in of.allowed])
    level = np.concatenate(of.allowed)
    for c in (0, 3, 5):
        change = in_levels.change(chosen, np.zeros(0), cluster, level - chosen[cluster])
        then = np.repeat(chosen[None], len(cluster), axis=0)
        then[np.arange(len(cluster)), cluster] = level
        np.testing.assert_allclose(change, found(of.counts(then)) - found(of.counts(chosen)), atol=1e-12)
        chosen[c] = of.allowed[c][0]


def test_steps_of_widths_are_seen() -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))

    def in_blocks(operation: Operation) -> float:
        return 1e-6 * sum(-(-n // 16) for n in operation.shapes[0].sizes)

    plan = trace(model, (torch.zeros(2, 8),))
    found = measure_times(model, plan, (torch.zeros(2, 8),), cache=None, clock=CalculatedClock(in_blocks, constant=1.0))
    at = {n: float(found(np.array([n]))) for n in (16, 24, 32, 40, 48, 64)}
    assert at[24] == pytest.approx(at[32])
    assert at[40] == pytest.approx(at[48])
    assert at[48] - at[32] == pytest.approx(2e-6)  # of the ReLU and of the second layer


def test_an_operation_that_cannot_be_called_narrower_shrinks_in_proportion() -> None:
    model, inputs = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 8)), (torch.zeros(2, 8),)

    def whole_only(operation: Operation) -> float:
        if operation.name.startswith("aten.silu") and operation.out.sizes[1] < 64:
            raise RuntimeError("not so")
        return 1e-3 if operation.name.startswith("aten.silu") else 0.0

    plan = trace(model, inputs)
    found = measure_times(model, plan, inputs, cache=None, clock=CalculatedClock(whole_only, constant=1.0))
    assert found(np.array([[64], [32], [16]])) == pytest.approx([1.0, 0.9995, 0.99925])


@pytest.mark.parametrize("others", [{}, {"macs": 0.5}, {"params": 0.4}])
def test_a_budget_of_time_is_met_from_below(plan: Plan, others: dict[str, float]) -> None:
    found = times(CalculatedClock(fixed=1e-3), plan)
    chosen = select(plan, damaged(plan), latency=0.7, costs={"latency": found}, **others)
    share = float(found(plan.counts(chosen.keep))) / found.dense
    assert share <= 0.7
    assert others or share > 0.66
    assert all(getattr(plan, kind)(chosen.keep) <= value * getattr(plan, kind)() for kind, value in others.items())
    assert "latency=0.7" in chosen.asked
    assert "a calculator" not in chosen.asked
    assert f"latency {share:.3f}" in chosen.met


def test_without_damage_the_budget_is_met_as_well(plan: Plan) -> None:
    found = times(CalculatedClock(), plan)
    chosen = select(plan, np.random.default_rng(0).random(plan.n_units), latency=0.6, costs={"latency": found})
    assert 0.5 < float(found(plan.counts(chosen.keep))) / found.dense <= 0.6


def test_steps_are_worth_keeping_to(plan: Plan) -> None:
    """Where time goes in blocks of 32 channels, the same time leaves more MACs than widths of any kind."""

    def in_blocks(operation: Operation) -> float:
        sides = operation.shapes[1].sizes[:2] if macs_of(operation) else (0,)
        return RATE * macs_of(operation) * float(np.prod([-(-n // 32) * 32 / max(n, 1) for n in sides]))

    stepped, smooth = times(CalculatedClock(in_blocks), plan), times(CalculatedClock(), plan)
    share = [
        float(stepped(plan.counts(select(plan, damaged(plan), latency=0.6, costs={"latency": c}).keep))) / stepped.dense
        for c in (stepped, smooth)
    ]
    assert share[0] <= 0.6 < share[1]


def test_a_budget_out_of_reach_says_what_limits_it(plan: Plan) -> None:
    found = times(CalculatedClock(fixed=1.0), plan)
    with pytest.raises(BudgetError, match=r"one gets down to 0\.\d+ of .* ms; 1000 ms of .* surround the operations"):
        select(plan, damaged(plan), latency=0.5, costs={"latency": found})


def test_a_time_is_asked_as_a_share_and_needs_its_cost(plan: Plan) -> None:
    with pytest.raises(ValueError, match="latency=12: give the share of the dense model's time"):
        select(plan, damaged(plan), latency=12)
    with pytest.raises(ValueError, match=r"latency= is counted by nothing here: .* \(measure_times\)"):
        select(plan, damaged(plan), latency=0.5)


def test_what_was_measured_is_not_measured_again(plan: Plan, tmp_path: Path) -> None:
    clocks = [CalculatedClock(), CalculatedClock(lambda _: 1e-3)]
    first, again = (
        measure_times(small_unet(), plan, cache=tmp_path, clock=clock) for clock in clocks
    )  # fmt: skip
    counts = random_counts(plan, 3)
    np.testing.assert_allclose(first(counts), again(counts))
    assert clocks[0].asked > 100
    assert clocks[1].asked == 0
    clocks[1].name = "another device"
    measure_times(small_unet(), plan, cache=tmp_path, clock=clocks[1])
    assert clocks[1].asked == clocks[0].asked


def test_a_broken_cache_is_measured_anew(plan: Plan, tmp_path: Path) -> None:
    clock = CalculatedClock()
    measure_times(small_unet(), plan, cache=tmp_path, clock=clock)
    (file,) = tmp_path.iterdir()
    file.write_text("{")
    asked = clock.asked
    measure_times(small_unet(), plan, cache=tmp_path, clock=clock)
    assert clock.asked == 2 * asked


def test_measuring_leaves_model_and_randomness_alone(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 3, 3)).train()
    inputs = (torch.zeros(1, 3, 8, 8),)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    plan, state = trace(model, inputs), torch.random.get_rng_state()
    found = measure_times(model, plan, inputs, cache=tmp_path)
    assert found.dense > 0
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_what_is_called_has_the_models_dtype_and_memory_format() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.SiLU(), nn.Conv2d(16, 3, 3))
    model = model.to(torch.bfloat16).to(memory_format=torch.channels_last)
    inputs, called = (torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16),), []

    def note(operation: Operation) -> float:
        called.extend(operation.shapes)
        ready(operation, torch.device("cpu"))()
        return 1e-3

    measure_times(model, trace(model, inputs), inputs, cache=None, clock=CalculatedClock(note, constant=1.0))
    assert {s.dtype for s in called} == {"bfloat16"}
    made = [tensor(s, torch.device("cpu")) for s in called if len(s.sizes) == 4]
    assert made
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in made)
    assert {tuple(t.shape) for t in made} >= {(2, 16, 6, 6), (2, 8, 6, 6), (8, 3, 3, 3)}
