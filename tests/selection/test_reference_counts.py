"""The method's published operating point, and selections on plans of real models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel

from diffprune_fast.plan import violations
from diffprune_fast.selection import select
from diffprune_fast.tracing import trace

CIFAR = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
}
SMALL_CONDITIONED = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
SMALL_VAE = {
    "sample_size": 32,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}


def plan_of(cls, config):
    with torch.device("meta"):
        return trace(cls(**config))


@pytest.fixture(scope="module")
def cifar():
    return plan_of(UNet2DModel, CIFAR)


@pytest.fixture(scope="module", params=["unet", "conditioned", "vae"])
def real(request, cifar):
    if request.param == "unet":
        return cifar
    if request.param == "conditioned":
        return plan_of(UNet2DConditionModel, SMALL_CONDITIONED)
    return plan_of(AutoencoderKL, SMALL_VAE)


def scores_for(plan, seed=0):
    return np.random.default_rng(seed).lognormal(size=plan.n_units)


def test_reference_rounding_reaches_the_published_operating_point(cifar):
    """google/ddpm-cifar10-32 at ratio 0.3: 19.8512M parameters and 3.3928 GMACs (the method's published code)."""
    kept = select(cifar, scores_for(cifar), ratio=0.3, rounding="reference").keep
    assert cifar.params(kept) == pytest.approx(19.8512e6, rel=0.005)
    assert cifar.macs(kept) == pytest.approx(3.3928e9, rel=0.005)
    widths = {(cifar[name].n_units, len(units)) for name, units in kept.items()}
    assert widths == {(128, 96), (256, 192), (256, 180), (512, 359)}


def test_a_quarter_of_the_published_model_is_a_narrower_config_but_for_its_sinusoids(cifar):
    """The time embedding is fed as many sinusoids as before (128); a config of width 96 would feed it 96."""
    kept = select(cifar, scores_for(cifar), ratio=0.25).keep
    plain = plan_of(UNet2DModel, {**CIFAR, "block_out_channels": (96, 192, 192, 192)})
    assert cifar.params(kept) - plain.params() == (128 - 96) * 384
    assert cifar.macs(kept) - plain.macs() == (128 - 96) * 384


@pytest.mark.parametrize("norm_groups", ["count", "exact"])
@pytest.mark.parametrize(
    "asked",
    [
        {"ratio": 0.3},
        {"ratio": 0.5, "ranking": "global", "round_to": 1},
        {"macs": 0.5},
        {"macs": 0.35, "offsets": "independent"},
        {"params": 0.6, "ranking": "local"},
    ],
)
def test_selections_on_real_plans_hold(real, asked, norm_groups):
    got = select(real, scores_for(real), norm_groups=norm_groups, **asked)
    assert violations(real, got.keep, norm_groups) == []
    for kind, cost in (("params", real.params), ("macs", real.macs)):
        if kind in asked:
            assert 0.93 * asked[kind] * cost() < cost(got.keep) <= asked[kind] * cost()


def test_counts_do_not_depend_on_the_scores_at_a_local_ratio(real):
    one, two = (select(real, scores_for(real, seed), ratio=0.3) for seed in (1, 2))
    assert real.counts(one.keep).tolist() == real.counts(two.keep).tolist()
