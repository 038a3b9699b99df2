"""Whole models of diffusers, pruned by plans, come nearer to what they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from models import small_condition_unet, small_unet, small_vae
from torch import Tensor, nn

from diffprune_fast.compensation import Compensation, compensate, estimate, estimates
from diffprune_fast.objective.conditioning import read_batch
from diffprune_fast.plan.keep_sets import sliced_shapes
from diffprune_fast.selection.select import select
from diffprune_fast.slicing.prune import prune
from diffprune_fast.tracing.trace import trace


def stirred(model: nn.Module) -> nn.Module:
    """Weights that are nowhere zero (gates and last layers begin there)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def dit() -> nn.Module:
    return DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, num_embeds_ada_norm=10
    )


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SMALL = {"block_out_channels": (16, 32), "norm_num_groups": 4}
UNET = {
    **SMALL,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}

# How to make the model, a batch of 24 samples, and what to trace it with.
MODELS: dict[str, Any] = {
    "UNet2DModel": (lambda: small_unet(**UNET), lambda: drawn(24, 3, 16, 16), None),
    "UNet2DConditionModel": (
        lambda: small_condition_unet(**SMALL),
        lambda: {"images": drawn(24, 4, 16, 16), "encoder_hidden_states": drawn(24, 5, 24, seed=1)},
        None,
    ),
    "DiTTransformer2DModel": (
        dit,
        lambda: (drawn(24, 4, 8, 8), torch.arange(24) % 10),
        {"hidden_states": drawn(1, 4, 8, 8), "timestep": torch.tensor([1]), "class_labels": torch.tensor([1])},
    ),
    "AutoencoderKL": (lambda: small_vae(**SMALL), lambda: drawn(24, 3, 16, 16).tanh(), None),
}


def pruned_and_compensated(name: str, **options: Any) -> Compensation:
    """A random 30 % of every group's channels gone."""
    torch.manual_seed(0)
    make, batch, example = MODELS[name]
    dense = stirred(make()).eval()
    plan = trace(dense, example)
    keep = select(plan, torch.rand(plan.n_units).numpy(), ratio=0.3).keep
    pruned = prune(dense, plan, keep, inplace=False, example_inputs=example).model
    kept = sliced_shapes(dense, plan, keep).kept
    return compensate(
        pruned, dense, [batch()], kept=kept, loss_fn=towards(dense), samples=16, progress=False, **options
    )


def towards(dense: nn.Module) -> Any:
    """Random models predict no noise, so the loss is the distance to the dense one's answers."""

    def answer(model: Any, batch: Any, t: Tensor, noise: Tensor) -> Tensor:
        images, inputs = read_batch(model, batch)
        if isinstance(model, AutoencoderKL):
            return model.decode(model.encode(images).latent_dist.mode()).sample
        return model(images + noise, timestep=t, **inputs).sample

    def loss(model: nn.Module, batch: Any, t: Tensor, noise: Tensor) -> Tensor:
        return (answer(model, batch, t, noise) - answer(dense, batch, t, noise)).square().flatten(1).mean(1)

    return loss


@pytest.mark.parametrize("name", MODELS)
def test_a_pruned_model_comes_nearer_to_the_dense_one(name: str) -> None:
    found = pruned_and_compensated(name)
    assert found.alone == {}
    assert found.compensated < 0.5 * found.sliced


def test_mixed_channels_bring_it_nearer_too() -> None:
    found = pruned_and_compensated("UNet2DModel", mode="channels")
    assert found.mode == "channels"
    assert found.compensated < 0.7 * found.sliced


def test_layers_whose_matrices_do_not_fit_are_solved_by_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pruned_and_compensated("UNet2DModel")
    monkeypatch.setattr(estimates, "free_bytes", lambda device: 1 << 20)
    found = pruned_and_compensated("UNet2DModel")
    assert "by conjugate gradients, their matrices don't fit" in found.why
    assert found.compensated == pytest.approx(whole.compensated, rel=0.1)


def test_a_dry_run_expects_what_the_real_one_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "throughput", lambda device: 1e12)
    torch.manual_seed(0)
    dense = stirred(small_unet(**UNET)).eval()
    plan = trace(dense)
    keep = select(plan, torch.rand(plan.n_units).numpy(), ratio=0.3).keep
    pruned = prune(dense, plan, keep, inplace=False).model
    kept = sliced_shapes(dense, plan, keep).kept
    expected = estimate(plan, keep, samples=16)
    found = compensate(pruned, dense, [drawn(24, 3, 16, 16)], kept=kept, samples=16, progress=False)
    convolutions = {n for n in found.layers if not n.rpartition(".")[2].startswith(("norm", "group_norm", "conv_norm"))}
    assert set(expected.forms) == convolutions
    assert expected.bytes == pytest.approx(found.bytes, rel=0.2)
    assert expected.mode == found.mode == "full"


def test_auto_mixes_channels_where_full_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = trace(small_unet(**UNET))
    counts = plan.counts() // 2
    assert estimate(plan, counts).mode == "full"
    monkeypatch.setattr(estimates, "throughput", lambda device: 1e5)
    monkeypatch.setattr(type(plan), "macs", lambda *_: 0)  # the forward takes no time
    found = estimate(plan, counts)
    assert found.mode == "channels"
    assert "full would take about" in found.why
