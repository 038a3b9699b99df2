"""Modules and tensors by name are PyTorch's, in its order."""

from __future__ import annotations

import torch
from torch import nn

from diffprune_fast.module_tree import buffers_of, modules_of, parameters_of


def tied() -> nn.Module:
    """A module at two places, a tied parameter, a shared buffer, a child that is None."""
    shared = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model = nn.ModuleDict({"b": nn.Sequential(shared, nn.Linear(2, 2)), "a": shared, "c": nn.BatchNorm1d(2)})
    model["b"][1].weight = shared[0].weight
    model["c"].running_mean = shared[1].running_mean
    model.register_module("none", None)
    model.register_parameter("own", nn.Parameter(torch.zeros(1)))
    return model


def test_modules_parameters_and_buffers_are_pytorchs() -> None:
    model = tied()
    assert list(modules_of(model).items()) == list(model.named_modules())
    for ours, theirs in (
        (parameters_of(model), model.named_parameters()),
        (buffers_of(model), model.named_buffers()),
    ):
        assert [(n, id(t)) for n, t in ours.items()] == [(n, id(t)) for n, t in theirs]


class Renaming(nn.Linear):
    """As FSDP does it."""

    def named_parameters(self, *args: object, **kwargs: object):  # type: ignore[no-untyped-def]
        for name, p in super().named_parameters():
            yield f"its_{name}", p


def test_a_models_own_names_are_used() -> None:
    assert list(parameters_of(Renaming(2, 2))) == ["its_weight", "its_bias"]
