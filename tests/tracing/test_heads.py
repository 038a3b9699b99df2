"""Whole heads as units: what goes together then, which attributes follow, and when "auto" takes heads."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import small_unet
from oracle import assert_exact
from torch import Tensor, nn
from zoo_language import FusedAttention, GroupedQueryAttention, rotated

import diffprune_fast as dpf

DIM, HEADS = 64, 8


class Around(nn.Module):
    """An attention between two projections of fixed outer width."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.out = nn.Linear(DIM, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x))


class NormedAttention(nn.Module):
    """Rotary embeddings and a norm over a head's dims, whose weight all heads share; explicit products."""

    def __init__(self, heads: int = HEADS, explicit: bool = False) -> None:
        super().__init__()
        self.num_heads, self.explicit = heads, explicit
        self.q, self.k, self.v = (nn.Linear(DIM, DIM) for _ in range(3))
        self.norm = nn.RMSNorm(DIM // heads)
        self.o = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = rotated(self.norm(q)), rotated(self.norm(k))
        if self.explicit:
            out = (q @ k.transpose(-1, -2) * 0.25).softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.o(out.transpose(1, 2).reshape(b, n, -1))


X = (torch.empty(1, 6, DIM),)


def test_heads_are_units_with_all_their_dims() -> None:
    plan = dpf.trace(Around(GroupedQueryAttention(DIM, HEADS, HEADS, False, "none")), X, units="heads")
    group = plan["attention.q"]
    assert group.n_units == HEADS
    assert {m.place: m.index.tolist() for m in group.members} == {
        place: np.arange(DIM).reshape(HEADS, -1).tolist()
        for place in ("attention.q.weight:0", "attention.k.weight:0", "attention.v.weight:0", "attention.o.weight:1")
    }
    assert not plan.scale_fixes


def test_query_heads_that_share_a_key_head_go_together() -> None:
    plan = dpf.trace(Around(GroupedQueryAttention(DIM, HEADS, 4, True, "interleave")), X, units="heads")
    sizes = {m.place: m.index.shape for m in plan["attention.q"].members}
    assert sizes["attention.q.weight:0"] == (4, 16)
    assert sizes["attention.k.weight:0"] == sizes["attention.v.weight:0"] == (4, 8)


def test_number_of_heads_follows_in_the_attributes() -> None:
    model = Around(GroupedQueryAttention(DIM, HEADS, 4, True, "expand")).double()
    plan = dpf.trace(model, X, units="heads")
    keep = {g.name: np.arange(g.n_units)[: 3 if g.name == "attention.q" else None] for g in plan.groups}
    dpf.prune(model, plan, keep, example_inputs=X)
    assert (model.attention.heads, model.attention.kv_heads) == (6, 3)
    assert model(torch.randn(2, 6, DIM, dtype=torch.float64)).shape == (2, 6, 5)


@pytest.mark.parametrize("explicit", [False, True])
def test_oracle_rotary_attention_with_a_shared_norm_loses_whole_heads(explicit: bool) -> None:
    torch.manual_seed(0)
    model = Around(NormedAttention(explicit=explicit)).double()
    result = assert_exact(
        model, lambda m: m(torch.linspace(-1, 1, 2 * 6 * DIM, dtype=torch.float64).view(2, 6, DIM)), example_inputs=X
    )
    assert result.plan["attention.q"].n_units == HEADS  # "auto" fell back to heads
    assert model.attention.num_heads == HEADS - 2
    assert model.attention.norm.weight.shape == (DIM // HEADS,)


def test_auto_takes_dims_where_they_can_go_one_by_one() -> None:
    for attention in (GroupedQueryAttention(DIM, HEADS, HEADS, False, "none"), FusedAttention(DIM, HEADS, "chunk")):
        model = Around(attention)
        assert dpf.trace(model, X) == dpf.trace(model, X, units="dims")
        assert dpf.trace(model, X) != dpf.trace(model, X, units="heads")


@pytest.mark.parametrize("layout", ["chunk", "heads"])
def test_oracle_heads_of_a_fused_projection(layout: str) -> None:
    model = Around(FusedAttention(DIM, HEADS, layout)).double()
    plan = dpf.trace(model, X, units="heads")
    group = plan["attention.qkv"]
    assert group.n_units == HEADS
    assert {m.place: m.index.shape[1] for m in group.members}["attention.qkv.weight:0"] == 3 * DIM // HEADS
    x = torch.randn(2, 6, DIM, dtype=torch.float64)
    want_keep = np.array([0, 2, 3, 5, 7])
    with torch.no_grad():
        for place in group.members:
            gone = np.setdiff1d(np.arange(HEADS), want_keep)
            index = torch.from_numpy(place.index[gone].reshape(-1))
            dict(model.named_parameters())[place.parameter].index_fill_(place.dim, index, 0.0)
        want = model(x)
        dpf.prune(model, plan, {"attention.qkv": want_keep}, example_inputs=X)
        assert torch.allclose(model(x), want, rtol=0, atol=1e-12)
    assert model.attention.heads == 5


def test_one_head_has_dims_only() -> None:
    model = Around(GroupedQueryAttention(DIM, 1, 1, False, "none"))
    assert dpf.trace(model, X, units="heads") == dpf.trace(model, X, units="dims")


def test_flux_heads_go_whole_and_keep_their_size() -> None:
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    inputs = {
        "hidden_states": torch.empty(1, 16, 8),
        "encoder_hidden_states": torch.empty(1, 7, 24),
        "pooled_projections": torch.empty(1, 16),
        "timestep": torch.ones(1),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(7, 3),
    }
    plan = dpf.trace(model, inputs)
    groups = [g for g in plan.groups if g.name.endswith("attn.to_q")]
    assert [g.n_units for g in groups] == [4, 4]
    assert {"transformer_blocks.0.attn.add_q_proj.weight:0", "transformer_blocks.0.attn.to_add_out.weight:1"} <= {
        m.place for m in groups[0].members
    }
    dpf.prune(model, plan, {groups[0].name: np.array([1, 2, 3])}, example_inputs=inputs)
    attention = model.transformer_blocks[0].attn
    assert (attention.heads, attention.to_q.out_features, attention.norm_q.weight.numel()) == (3, 48, 16)


def test_heads_of_a_unet_go_whole() -> None:
    plan = dpf.trace(small_unet(attention_head_dim=8), units="heads")
    heads = [g for g in plan.groups if "to_q" in g.name]
    assert heads
    for group in heads:
        assert all(m.index.shape[1] == 8 for m in group.members), group.name


def test_unknown_units_are_refused() -> None:
    with pytest.raises(ValueError, match="units='channels': choose one of 'auto', 'dims', 'heads'"):
        dpf.trace(small_unet(), units="channels")
