"""Layers that users bring: gated halves, L2 norms with a gain, GPT-2's transposed linear layers."""

from __future__ import annotations

import diffusers
import pytest
import torch
import torch.nn.functional as F
import transformers
from oracle import assert_exact
from torch import Tensor, nn

import diffprune_fast as dpf

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.g, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 48, 1), nn.Conv2d(24, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.glu(self.g(F.silu(self.a(x))), 1))


class Normalised(nn.Module):
    """RMSNorm as Wan's and Qwen's autoencoders and lucidrains' UNets have it; ``follows``: its factor is read anew."""

    def __init__(self, follows: bool = False, between: str = "norm") -> None:
        super().__init__()
        self.follows, self.between, self.scale = follows, between, 16**0.5
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 3, 1)
        self.g = nn.Parameter(torch.ones(16, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.between == "added":
            return self.b(h + h.norm(dim=1, keepdim=True))
        return self.b(F.silu(F.normalize(h, dim=1) * (h.shape[1] ** 0.5 if self.follows else self.scale) * self.g))


def test_halves_of_a_gate_keep_equally_many() -> None:
    model = Gated()
    assert_exact(model, lambda m: m(X), example_inputs=(X[:1],))
    assert model.g.out_channels == 2 * model.b.in_channels < 48


def test_an_l2_norm_that_divides_its_own_channels_is_a_norm() -> None:
    model = Normalised()
    assert_exact(model, lambda m: m(X), example_inputs=(X[:1],))
    assert model.a.out_channels < 16


@pytest.mark.parametrize("model", [Normalised(follows=True), Normalised(between="added")], ids=["factor", "added"])
def test_an_l2_norm_that_is_used_otherwise_keeps_its_channels(model: nn.Module) -> None:
    assert not dpf.trace(model, (X[:1].float(),)).groups


def test_gpt2_is_exact() -> None:
    config = transformers.GPT2Config(vocab_size=40, n_embd=24, n_layer=2, n_head=4, n_positions=16, use_cache=False)
    model = transformers.GPT2LMHeadModel(config).double().eval()
    ids = torch.arange(3, 12)[None]
    whole = sum(p.numel() for p in model.parameters())
    assert_exact(model, lambda m: m(input_ids=ids).logits, example_inputs={"input_ids": ids})
    assert sum(p.numel() for p in model.parameters()) < 0.9 * whole


def test_stable_video_diffusions_temporal_decoder_is_exact() -> None:
    blocks = ("DownEncoderBlock2D", "DownEncoderBlock2D")
    model = diffusers.AutoencoderKLTemporalDecoder(
        3, 3, blocks, block_out_channels=(32, 64), layers_per_block=1, sample_size=16
    )

    def run(m: nn.Module) -> Tensor:
        z = m.encode(torch.cat([X, X], 3)).latent_dist.parameters[:, :4]
        return m.decode(z, num_frames=2).sample

    result = assert_exact(model, run, norm_groups="count")
    assert result.after.params < 0.7 * result.before.params


def test_heads_are_taken_whole_where_only_the_probe_finds_that_dims_have_to_stay() -> None:
    config = transformers.T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    model = transformers.T5EncoderModel(config).eval()
    plan = dpf.trace(model, {"input_ids": torch.arange(3, 12)[None]})
    assert plan["encoder.block.0.layer.0.SelfAttention.q"].n_units == 4
