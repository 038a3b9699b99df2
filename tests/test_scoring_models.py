"""diffusers' models under their traced plans."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from models import small_condition_unet, small_unet, small_vae
from scoring_models import by_hand, gradients, weights
from torch import nn

from diffprune_fast.scoring import make_objective, score
from diffprune_fast.scoring.accumulate import NOISE
from diffprune_fast.scoring.untouched import generator_for
from diffprune_fast.tracing import trace

torch.set_num_threads(1)


def batch_for(model: nn.Module, n: int = 2, size: int = 16) -> Any:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, model.config["in_channels"], size, size, generator=generator).double()
    if "cross_attention_dim" not in model.config:
        return images
    text = torch.randn(n, 5, model.config["cross_attention_dim"], generator=generator).double()
    return {"images": images, "encoder_hidden_states": text}


MODELS = {
    "UNet2DModel": (small_unet, DDPMScheduler(prediction_type="v_prediction"), [0, 20, 300]),
    "UNet2DConditionModel": (small_condition_unet, DDPMScheduler(), [0, 20, 300]),
    "AutoencoderKL": (small_vae, None, [0]),
}


@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS.keys())
def test_scores_of_a_traced_model_are_the_formulas(case: tuple[Any, Any, list[int]]) -> None:
    make, scheduler, timesteps = case
    torch.manual_seed(0)
    model = make().double().eval()
    plan, batch = trace(model), batch_for(model)
    options: dict[str, Any] = {"scheduler": scheduler, "timesteps": timesteps, "seed": 3, "progress": False}
    found = score(model, [batch], plan, estimator="reference", **options)

    objective = make_objective(model, scheduler)
    noise = objective.noise(batch, generator_for(3, NOISE, 0))
    summed = gradients(model, sum(objective.loss(model, batch, t, noise) for t in timesteps))  # type: ignore[arg-type]
    theta = weights(model)
    expected = by_hand(plan, {n: (theta[n] * summed[n]).abs() for n in theta})
    np.testing.assert_allclose(found.values, expected, rtol=1e-8, atol=1e-14)
    assert plan.n_units > 50
    assert (found.values > 0).any()


@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS.keys())
def test_micro_reaches_every_group_of_a_traced_model(case: tuple[Any, Any, list[int]]) -> None:
    make, scheduler, _ = case
    torch.manual_seed(0)
    model = make().eval()
    # diffusers starts some layers at zero: nothing flows back through those
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    plan, batch = trace(model), batch_for(model, n=4)
    batch = {k: v.float() for k, v in batch.items()} if isinstance(batch, dict) else batch.float()
    found = score(
        model, [batch], plan, scheduler=scheduler, micro_batch=2, min_samples=8, max_samples=8, progress=False
    )
    assert found.values.shape == (plan.n_units,)
    assert np.isfinite(found.values).all()
    for group in plan.groups:
        assert (found.of(plan, group.name) > 0).any(), group.name
    assert (found.curve is None) == (scheduler is None)
