"""Peak memory counted on meta, beside what is alive in a real forward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import small_unet
from torch import nn

from diffprune_fast import prune, select, trace
from diffprune_fast.footprint import count_memory
from diffprune_fast.plan.lattice import lattice
from diffprune_fast.scoring.scores import Scores
from diffprune_fast.selection.costs import CostOfLevels


@pytest.mark.parametrize("batch", [1, 8])
def test_it_is_what_is_alive_in_a_real_forward(batch: int) -> None:
    model = small_unet().eval()
    inputs = {"sample": torch.zeros(batch, 3, 16, 16), "timestep": torch.zeros(batch, dtype=torch.long)}
    plan = trace(model, inputs)
    memory = count_memory(model, plan, inputs)
    keep = select(plan, np.random.default_rng(0).random(plan.n_units), macs=0.5).keep
    sliced = prune(model, plan, keep, inplace=False, example_inputs=inputs, proof=False).model
    predicted = [float(memory(plan.counts(k))) for k in ({}, keep)]
    assert predicted == pytest.approx(memory.measured([model, sliced]), rel=0.01)


def test_a_tensor_that_is_still_needed_counts() -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Linear(4, 16, bias=False), nn.Linear(16, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a = self.wide(x)
            b = a.relu()
            c = b.sigmoid()
            return self.narrow(a * c) if x.dim() == 2 else x

    model, x = Kept(), torch.zeros(10, 4)
    plan = trace(model, (x,))
    memory = count_memory(model, plan, (x,))
    for n in (16, 5):
        assert float(memory(np.array([n]))) == 4 * (8 * n + 10 * (4 * n + 4))  # all are alive to the end of the forward


def test_a_budget_of_memory_is_met_together_with_another() -> None:
    model = small_unet()
    plan = trace(model)
    memory, values = count_memory(model, plan), np.random.default_rng(0).random(plan.n_units)
    scores = Scores(values, "none", "random", 0, damage=values)
    found = select(plan, scores, memory=0.6, macs=0.8, costs={"memory": memory})
    share = float(memory(plan.counts(found.keep))) / float(memory(plan.counts()))
    assert 0.5 < share <= 0.6
    assert plan.macs(found.keep) <= 0.8 * plan.macs()
    assert "MB" in found.asked


def test_what_a_step_saves_is_the_difference() -> None:
    model = small_unet()
    plan = trace(model)
    memory, of = count_memory(model, plan), lattice(plan, "count", 8)
    in_levels, chosen = CostOfLevels(memory, of), np.array([some[len(some) // 2] for some in of.allowed])
    cluster = np.repeat(np.arange(len(of.levels)), [len(c) for c in of.allowed])
    level = np.concatenate(of.allowed)
    then = np.repeat(chosen[None], len(cluster), axis=0)
    then[np.arange(len(cluster)), cluster] = level
    change = in_levels.change(chosen, np.zeros(0), cluster, level - chosen[cluster])
    np.testing.assert_allclose(change, memory(of.counts(then)) - memory(of.counts(chosen)), atol=1e-3)
