"""Masks of weights say the same as keep-sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import CASES
from oracle import masked_dense, random_keep
from random_plans import random_plan
from torch import nn
from torch.nn.utils import prune as torch_prune

import diffprune_fast as dpf
from diffprune_fast.plan import keep_from_masks

OF_MODELS = {c.name: c for c in CASES}


@pytest.mark.parametrize("seed", range(20))
def test_masks_of_a_keep_set_give_it_back(seed: int) -> None:
    plan, rng = random_plan(seed), np.random.default_rng(seed)
    keep = {g.name: np.flatnonzero(rng.random(g.n_units) < rng.choice([0.3, 0.9, 1.0])) for g in plan.groups}
    found = keep_from_masks(plan, plan.masks(keep))
    assert {n: k.tolist() for n, k in found.items()} == {n: k.tolist() for n, k in keep.items()}


@pytest.mark.parametrize("name", ["ResidualCNN", "GroupedCNN", "UNet2DModel-heads"])
def test_masked_weights_are_the_dense_ones_without_what_goes(name: str) -> None:
    case = OF_MODELS[name]
    model = case.make()
    plan = dpf.trace(model, case.example_inputs)
    keep = random_keep(plan, 0.5, 0)
    masks, masked = plan.masks(keep), masked_dense(model, plan, keep)
    assert masks
    for n, p in model.named_parameters():
        expected = p.detach() * torch.from_numpy(masks[n]) if n in masks else p
        assert torch.equal(expected, masked.get_parameter(n)), n


def chain() -> tuple[nn.Module, dpf.Plan]:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    return model, dpf.trace(model, (torch.zeros(1, 4),))


def test_structured_pruning_of_torch_becomes_a_smaller_model() -> None:
    model, plan = chain()
    for i in (0, 2):
        torch_prune.ln_structured(model[i], "weight", amount=2, n=2, dim=0)
        rows = model[i].weight_mask.any(1).nonzero().reshape(-1).tolist()
        torch_prune.custom_from_mask(model[i], "bias", model[i].weight_mask[:, 0])
        model[i].expected = rows
    masks = {f"{i}.{t}": getattr(model[i], f"{t}_mask") for i in (0, 2) for t in ("weight", "bias")}
    x = torch.randn(3, 4)
    masked = model(x)
    for i in (0, 2):
        torch_prune.remove(model[i], "weight")
        torch_prune.remove(model[i], "bias")
    keep = keep_from_masks(plan, masks)
    assert [keep[n].tolist() for n in ("0", "2")] == [model[0].expected, model[2].expected]
    dpf.prune(model, plan, keep, example_inputs=(x,))
    torch.testing.assert_close(model(x), masked)


def test_masks_of_ours_in_torchs_pruning() -> None:
    model, plan = chain()
    for name, mask in plan.masks({"0": np.arange(3)}).items():
        layer, _, tensor = name.rpartition(".")
        torch_prune.custom_from_mask(model.get_submodule(layer), tensor, torch.from_numpy(mask))
    assert model[0].weight.any(1).tolist() == [True] * 3 + [False] * 3
    assert model[2].weight.any(0).tolist() == [True] * 3 + [False] * 3


def test_scattered_zeros_take_nothing_away() -> None:
    _, plan = chain()
    mask = np.ones((6, 4))
    mask[np.arange(6), np.arange(6) % 4] = 0
    assert len(keep_from_masks(plan, {"0.weight": mask})["0"]) == 6


@pytest.mark.parametrize(("name", "shape"), [("0.weight", (6, 5)), ("9.weight", (2, 2))])
def test_a_mask_that_doesnt_fit_is_named(name: str, shape: tuple[int, ...]) -> None:
    _, plan = chain()
    with pytest.raises(ValueError, match=rf"the mask of {name} has shape"):
        keep_from_masks(plan, {name: np.ones(shape)})
