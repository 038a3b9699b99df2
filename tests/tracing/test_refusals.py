"""Models that can't be sliced are refused by trace; classes are known by what they are, not by their name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_exact
from torch import Tensor, nn

import diffprune_fast as dpf
from diffprune_fast.tracing import TraceError

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def chain(middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 16), middle, nn.Linear(16, 4))


def test_a_scripted_module_is_refused_by_name() -> None:
    model = chain(torch.jit.script(nn.Sequential(nn.Linear(16, 16), nn.ReLU())))
    with pytest.raises(TraceError, match=r"^1 is compiled by torch.jit.script"):
        dpf.trace(model, (torch.zeros(1, 5),))


def test_parameters_tied_through_their_data_are_refused() -> None:
    model = chain(nn.Linear(16, 16))
    model[1].weight.data = torch.zeros(16, 16)
    model.append(nn.Linear(4, 16)).append(nn.Linear(16, 16)).append(nn.Linear(16, 2))
    model[4].weight.data = model[1].weight.data
    with pytest.raises(TraceError, match=r"1\.weight and 4\.weight are two tensors in the same memory"):
        dpf.trace(model, (torch.zeros(1, 5),))


def test_windows_of_one_flat_tensor_are_refused() -> None:
    model = chain(nn.ReLU())
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(flat, model.parameters())
    with pytest.raises(TraceError, match="in the same memory"):
        dpf.trace(model, (torch.zeros(1, 5),))


def test_shared_memory_that_nothing_is_sliced_from_is_no_matter() -> None:
    model = chain(nn.ReLU())
    model.one, model.two = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    model.two.data = model.one.data
    model.forward = lambda x: model[2](model[1](model[0](x)))
    assert [g.name for g in dpf.trace(model, (torch.zeros(1, 5),)).groups] == ["0"]


def test_a_tensor_made_of_others_is_refused() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model = chain(nn.ReLU())
    model[0].weight = nn.Parameter(TwoTensor(torch.zeros(16, 5), torch.zeros(16, 5)))
    with pytest.raises(TraceError, match=r"0\.weight is a TwoTensor, a tensor made of others"):
        dpf.trace(model, (torch.zeros(1, 5),))


class PatchEmbed(nn.Module):
    """Of the name of a class of diffusers."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 32, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    def __init__(self, enters: bool) -> None:
        super().__init__()
        self.enters, self.embed, self.head = enters, PatchEmbed(), nn.Linear(32, 10)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) if self.enters else self.embed.proj(x).flatten(2).transpose(1, 2)
        return self.head((x + self.mlp(x)).mean(1))


@pytest.mark.parametrize("enters", [True, False])
def test_another_class_called_patch_embed_is_pruned(enters: bool) -> None:
    model = ViT(enters)
    assert_exact(model, lambda m: m(X), example_inputs=(X[:1],))
    assert model.embed.proj.out_channels < 32


class MultiheadAttention(nn.Module):
    """Of the name of a class of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_another_class_called_multihead_attention_is_pruned() -> None:
    model = nn.Sequential(nn.Linear(5, 24), MultiheadAttention(), nn.Linear(24, 3))
    plan = dpf.trace(model, (torch.zeros(1, 7, 5),))
    assert "1.qkv" in [g.name for g in plan.groups]
    assert np.sum([g.name.startswith("1.") for g in plan.groups]) > 1
