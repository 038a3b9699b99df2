"""``sweep``: many budgets out of one scoring run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from models import small_unet
from torch import Tensor

import diffprune_fast as dpf
from diffprune_fast.selection.budgets import BudgetError

QUICK: dict[str, Any] = {"max_samples": 32, "progress": False, "round_to": 4}


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(32, 3, 16, 16, generator=generator) * 2 - 1 for _ in range(6)]


def test_each_point_is_what_pruning_to_that_budget_gives() -> None:
    torch.manual_seed(0)
    model = small_unet(block_out_channels=(16, 32, 32)).eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = dpf.sweep(model, images(), budgets=(0.7, 0.5, 0.01), **QUICK)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [point.asked for point in found.points] == [0.7, 0.5]
    assert "gets down to" in found.missing[0.01]
    alone = dpf.score_and_prune(model, images(), macs=0.5, inplace=False, **QUICK)
    assert alone.compensation is not None
    assert alone.after == found.points[1].after
    assert found.points[1].sliced == pytest.approx(alone.compensation.sliced, rel=1e-3)
    assert found.dense == pytest.approx(alone.compensation.dense, rel=1e-3)
    assert found.points[1].compensated <= found.points[1].sliced
    figure = found.figure()
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].get_lines()}
    np.testing.assert_allclose(np.sort(lines["compensated"]), np.sort([p.compensated for p in found.points]))
    assert len(str(found).splitlines()) == 5


def test_budgets_that_cannot_be_met_are_an_error() -> None:
    with pytest.raises(BudgetError, match="gets down to"):
        dpf.sweep(small_unet(), images(), budgets=(0.01,), **QUICK)
