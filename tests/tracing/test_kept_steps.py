"""What a traced model computes is kept beside its plan, and not believed where the model is another meanwhile."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import diffprune_fast as dpf
from diffprune_fast.tracing import kept_steps

FORWARDS: list[str] = []
KEEP = {"first": np.arange(5)}


class Counted(nn.Module):
    """Two layers, and a factor that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 4)
        self.factor = 2.0

    def forward(self, x: Tensor) -> Tensor:
        FORWARDS.append("one")
        return self.last(torch.relu(self.first(x)) * self.factor)


def forwards_of_pruning(model: nn.Module, plan: dpf.Plan, x: Tensor) -> int:
    before = len(FORWARDS)
    dpf.prune(model, plan, KEEP, example_inputs=(x,), proof=False)
    return len(FORWARDS) - before


def test_a_traced_model_is_not_walked_again():
    model = Counted()
    assert forwards_of_pruning(model, dpf.trace(model, (torch.zeros(1, 4),)), torch.ones(1, 4)) == 1


@pytest.mark.parametrize("other", [torch.zeros(2, 4), torch.zeros(1, 4, dtype=torch.float64)], ids=["shape", "dtype"])
def test_it_is_walked_with_other_inputs(other: Tensor):
    model = Counted()
    plan = dpf.trace(model, (torch.zeros(1, 4),))
    assert forwards_of_pruning(model.to(other.dtype), plan, other) == 2


def test_another_model_of_the_plan_is_walked():
    plan = dpf.trace(Counted(), (torch.zeros(1, 4),))
    assert forwards_of_pruning(Counted(), plan, torch.zeros(1, 4)) == 2


def test_a_model_that_changed_since_its_trace_is_compared_with_what_it_is_now():
    model = Counted()
    plan = dpf.trace(model, (torch.zeros(1, 4),))
    model.factor = 3.0
    dpf.prune(model, plan, KEEP, example_inputs=(torch.zeros(1, 4),), proof=False)
    assert model.first.weight.shape == (5, 4)


def test_steps_go_with_the_plan():
    model = Counted()
    plan = dpf.trace(model, (torch.zeros(1, 4),))
    key = id(plan)
    assert key in kept_steps._KEPT
    del plan
    gc.collect()
    assert key not in kept_steps._KEPT


def test_the_collector_runs_again_after_a_trace():
    dpf.trace(Counted(), (torch.zeros(1, 4),))
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    try:
        dpf.trace(Counted(), (torch.zeros(1, 4),))
        assert not gc.isenabled()
    finally:
        gc.enable()
