"""A dependency graph of Torch-Pruning as a plan: the same groups as the exact analysis finds, where both find any."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning as tp
from pruned_by_tp import CASES
from torch import Tensor, nn

import diffprune_fast as dpf
from diffprune_fast.integrations.torch_pruning import plan_from_dependency_graph
from diffprune_fast.slicing import SliceError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
WITHOUT_ATTENTION = ["residual", "grouped", "normed", "resnet"]


def plan_of(case: str, model: nn.Module, inputs: Any, **options: Any) -> dpf.Plan:
    options = {"ignored_layers": CASES[case].ignored(model), **options}
    return plan_from_dependency_graph(CASES[case].graph(model, inputs), **options)


def tables(plan: dpf.Plan) -> dict[frozenset[str], list[bytes]]:
    return {frozenset(m.place for m in g.members): sorted(m.index.tobytes() for m in g.members) for g in plan.groups}


@pytest.mark.parametrize("case", WITHOUT_ATTENTION)
def test_groups_are_those_of_trace(case: str) -> None:
    model, inputs = CASES[case].make()
    assert tables(plan_of(case, model, inputs)) == tables(dpf.trace(model, (inputs,)))


@pytest.mark.parametrize("case", WITHOUT_ATTENTION)
def test_constraints_and_costs_are_those_of_trace(case: str) -> None:
    model, inputs = CASES[case].make()
    ours, theirs = plan_of(case, model, inputs, example_inputs=inputs), dpf.trace(model, (inputs,))

    def rows(plan: dpf.Plan) -> set[tuple[str, bytes]]:
        return {(c.kind, c.rows.tobytes()) for c in plan.constraints}

    assert rows(ours) == rows(theirs)
    keep = dpf.select(theirs, np.random.default_rng(0).random(theirs.n_units), ratio=0.5, round_to=1).keep
    assert ours.complexity() == theirs.complexity()
    assert ours.complexity(keep) == theirs.complexity(keep)


@pytest.mark.parametrize("case", WITHOUT_ATTENTION)
def test_the_plan_prunes(case: str) -> None:
    model, inputs = CASES[case].make()
    plan = plan_of(case, model, inputs)
    scores = np.random.default_rng(0).random(plan.n_units)
    result = dpf.prune(model, plan, dpf.select(plan, scores, ratio=0.5, round_to=1).keep, example_inputs=(inputs,))
    assert result.after.params < 0.7 * result.before.params
    assert sum(p.numel() for p in model.parameters()) == result.after.params
    model(inputs)


def test_a_unet_whose_attentions_stay() -> None:
    model, inputs = CASES["unet"].make()
    stays = [m for n, m in model.named_modules() if n.endswith(("to_q", "to_k", "to_v"))]
    plan = plan_of("unet", model, inputs, ignored_layers=[*stays, model.conv_out], example_inputs=inputs)
    scores = np.random.default_rng(0).random(plan.n_units)
    result = dpf.prune(model, plan, dpf.select(plan, scores, macs=0.6).keep, example_inputs=inputs)
    assert 0.5 < result.after.macs / result.before.macs <= 0.6
    assert model(**inputs).sample.shape == (1, 3, 16, 16)


def test_a_graph_that_doesnt_tell_heads_apart_is_refused() -> None:
    model, inputs = CASES["vit"].make()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    plan = plan_of("vit", model, inputs)
    keep = dpf.select(plan, np.random.default_rng(0).random(plan.n_units), ratio=0.5).keep
    with pytest.raises(SliceError, match=r"layers\.0\.attention"):
        dpf.prune(model, plan, keep, example_inputs=(inputs,))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_what_stays_says_why() -> None:
    model, inputs = CASES["normed"].make()
    frozen = plan_of("normed", model, inputs, ignored_layers=[]).frozen
    assert frozen["5.weight:0"] == "is an output of the model"
    assert frozen["0.weight:1"] == "is in no group of the dependency graph"


def test_a_layer_with_a_pruner_of_its_own_stays() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.lstm, self.after = nn.Linear(4, 8), nn.LSTM(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.after(self.lstm(self.before(x))[0])

    model = Recurrent()
    graph = tp.DependencyGraph().build_dependency(model, torch.zeros(3, 1, 4), verbose=False)
    plan = plan_from_dependency_graph(graph)
    assert not plan.groups
    assert plan.frozen["before.weight:0"] == "LSTM has a pruner of its own"
