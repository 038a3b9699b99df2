"""PlanPruner: Torch-Pruning's importances over exact groups, on models that its own graph can and can't follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning as tp
from pruned_by_tp import CASES, vit
from torch import nn
from zoo import ZOO

import diffprune_fast as dpf
from diffprune_fast.integrations.torch_pruning import FusedImportance, PlanPruner, plan_to_groups

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
Magnitude, Taylor = tp.importance.GroupMagnitudeImportance, tp.importance.GroupTaylorImportance
OF_ZOO = {c.name: c for c in ZOO}


def swin() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4)
    return SwinForImageClassification(config)


def of_zoo(name: str) -> tuple[nn.Module, Any, Callable[[nn.Module], Any]]:
    case = OF_ZOO[name]
    return case.make(), case.example_inputs, case.run


def of_images(make: Callable[[], nn.Module], size: int) -> tuple[nn.Module, Any, Callable[[nn.Module], Any]]:
    x = torch.linspace(-1, 1, 3 * size * size, dtype=torch.float64).reshape(1, 3, size, size)
    return make(), x, lambda model: model(x).logits


MODELS: dict[str, Callable[[], tuple[nn.Module, Any, Callable[[nn.Module], Any]]]] = {
    "DiT": lambda: of_zoo("DiTTransformer2DModel"),
    "PixArt": lambda: of_zoo("PixArtTransformer2DModel"),
    "SD3": lambda: of_zoo("SD3Transformer2DModel-3"),
    "Flux": lambda: of_zoo("FluxTransformer2DModel"),
    "ViT": lambda: of_images(vit, 16),
    "Swin": lambda: of_images(swin, 32),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_step_on_models_that_its_graph_cannot_follow(name: str) -> None:
    torch.manual_seed(0)
    model, inputs, run = MODELS[name]()
    model.double().eval()
    before = run(model).shape
    result = PlanPruner(model, inputs, Magnitude(), ratio=0.3, round_to=1).step()
    assert result.after.params < 0.75 * result.before.params
    assert run(model).shape == before


@pytest.mark.parametrize("case", ["residual", "normed", "resnet"])
@pytest.mark.parametrize(
    "importance", [Magnitude(), Taylor(multivariable=True, group_reduction="max")], ids=["magnitude", "taylor"]
)
def test_importances_are_those_of_its_own_groups(case: str, importance: Any) -> None:
    model, inputs = CASES[case].make()
    theirs = {}
    for group in CASES[case].groups(model, inputs):
        name = next(n for n, m in model.named_modules() if m is group[0].dep.target.module)
        theirs[name] = importance(group).double().numpy()
    found = plan_to_groups(dpf.trace(model, (inputs,)), model)
    compared = [g for g in found if g.name in theirs]
    assert compared
    for group in compared:
        np.testing.assert_allclose(group.importance(importance), theirs[group.name], rtol=1e-5)


@pytest.mark.parametrize("name", ["LanguageModel-rotary-gqa", "FluxTransformer2DModel"])
def test_units_of_several_channels_have_their_mean(name: str) -> None:
    model, inputs, _ = of_zoo(name)
    plan = dpf.trace(model, inputs)
    parameters = dict(model.named_parameters())
    importance = Magnitude(group_reduction="sum", normalizer=None)
    several = [g for g in plan_to_groups(plan, model) if g.per_unit > 1]
    assert several
    for group in several:
        expected = np.zeros(group.n_units)
        for member in plan[group.name].members:
            owner = model.get_submodule(member.parameter.rpartition(".")[0])
            if isinstance(owner, nn.Linear) and member.parameter.endswith("weight"):
                squares = parameters[member.parameter].detach().square().sum(1 - member.dim).double().numpy()
                expected += squares[member.index].sum(1)
        np.testing.assert_allclose(group.importance(importance), expected / group.per_unit, rtol=1e-4)


def test_the_fused_importance_over_a_plans_groups() -> None:
    model, inputs = CASES["unet"].make()
    groups = plan_to_groups(dpf.trace(model, inputs), model)
    fused, plain = FusedImportance("diff-pruning"), Taylor()
    assert len(groups) > 10
    for group in groups:
        np.testing.assert_allclose(group.importance(fused), group.importance(plain), rtol=1e-4)


def test_budgets_and_a_second_step() -> None:
    model, inputs = CASES["unet"].make()
    pruner = PlanPruner(model, inputs, Taylor(), macs=0.7)
    first = pruner.step()
    assert first.after.macs <= 0.7 * first.before.macs
    second = pruner.step()
    assert second.before == first.after
    assert second.after.macs <= 0.7 * first.after.macs


def test_an_optimizer_goes_on() -> None:
    model, inputs = CASES["normed"].make()
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.step()
    PlanPruner(model, inputs, Magnitude(), ratio=0.5).step(optimizer)
    for p in model.parameters():
        assert optimizer.state[p]["exp_avg"].shape == p.shape
    model(inputs).sum().backward()
    optimizer.step()


def test_groups_that_an_importance_knows_nothing_of_have_ones() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    pruner = PlanPruner(model, torch.zeros(1, 3, dtype=torch.long), tp.importance.BNScaleImportance(), ratio=0.5)
    assert (pruner.scores() == 1).all()
