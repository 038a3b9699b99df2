"""Budgets of time: measured on what was selected, and selected anew where that is off."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from calculated_clock import CalculatedClock
from models import small_unet

import diffprune_fast as dpf
from diffprune_fast.footprint import measure_times
from diffprune_fast.footprint import times as times_module

QUICK: dict[str, Any] = {"criterion": "magnitude", "round_to": 4, "progress": False, "proof": False}


@pytest.mark.parametrize("saves", [0.7, 1.0, 1.2])
def test_what_is_measured_is_what_was_asked(saves: float) -> None:
    model = small_unet()
    plan = dpf.trace(model)
    clock = CalculatedClock(fixed=2e-3, saves=saves)
    times = measure_times(model, plan, round_to=4, cache=None, clock=clock)
    result = dpf.score_and_prune(model, None, latency=0.75, plan=plan, costs={"latency": times}, **QUICK)
    (promise,) = result.promises
    before, after = clock.models([small_unet(), model], None)
    assert promise.measured == pytest.approx(after / before)
    assert 0.75 * 0.94 < promise.measured <= 0.75 * 1.02
    assert promise.predicted == pytest.approx(promise.measured, abs=0.02)
    assert f"latency: asked 0.75, predicted {promise.predicted:.3f}, measured {promise.measured:.3f} of " in str(result)


def test_without_costs_it_is_measured_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    clock = CalculatedClock()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(times_module, "DeviceClock", lambda device: clock)
    result = dpf.score_and_prune(small_unet(), None, latency=0.6, memory=0.9, **QUICK)
    assert clock.asked > 0
    assert [p.kind for p in result.promises] == ["latency", "memory"]
    assert all(p.measured is not None and p.measured <= p.asked * 1.02 for p in result.promises)
    assert list(tmp_path.glob("diffprune_fast/times-*.json"))


def test_a_cost_of_ones_own_is_met_and_not_measured() -> None:
    result = dpf.score_and_prune(
        small_unet(), None, memory=0.5, costs={"memory": lambda counts: counts.sum(axis=-1)}, **QUICK
    )
    (promise,) = result.promises
    assert promise.measured is None
    assert 0.4 < promise.predicted <= 0.5
    assert "not measured" in str(promise)


def test_it_is_noted_in_the_record() -> None:
    result = dpf.score_and_prune(small_unet(), None, memory=0.5, **QUICK)
    noted = dpf.result.noted(result)["promises"]
    assert noted[0]["kind"] == "memory"
    assert noted[0]["measured"] == result.promises[0].measured


@pytest.mark.parametrize(("options", "message"), [
    ({"drop_blocks": 1}, "call drop_blocks first"),
    ({"layout": "config"}, "goes with ratio, params or macs"),
    ({"like": {"block_out_channels": (16, 32, 32)}}, "leave out latency"),
])  # fmt: skip
def test_what_does_not_go_with_time_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dpf.score_and_prune(small_unet(), None, latency=0.5, criterion="magnitude", **options)


def test_a_sweep_of_memory_measures_every_point() -> None:
    torch.manual_seed(0)
    images = [torch.rand(16, 3, 16, 16) * 2 - 1 for _ in range(4)]
    model = small_unet(block_out_channels=(16, 32, 32)).eval()
    found = dpf.sweep(
        model, images, kind="memory", budgets=(0.8, 0.6, 0.01), max_samples=32, progress=False, round_to=4
    )
    assert [p.asked for p in found.points] == [0.8, 0.6]
    assert all(0.8 * p.asked < p.share <= 1.02 * p.asked for p in found.points)
    assert "can't be met" in found.missing[0.01]
    assert "measured" in str(found)
    shares = np.sort([p.share for p in found.points])
    lines = {line.get_label(): line for line in found.figure().axes[0].get_lines()}
    np.testing.assert_allclose(np.sort(lines["compensated"].get_xdata()), shares)
