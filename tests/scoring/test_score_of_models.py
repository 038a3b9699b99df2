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

from diffprune_fast.objective import make_objective
from diffprune_fast.objective.randomness import NOISE, generator_for
from diffprune_fast.scoring import score
from diffprune_fast.tracing import trace


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
    plan, batch = trace(model), batch_for(model, n=2, size=8)
    batch = {k: v.float() for k, v in batch.items()} if isinstance(batch, dict) else batch.float()
    found = score(model, [batch], plan, scheduler=scheduler, micro_batch=2, max_samples=4, progress=False)
    assert found.values.shape == (plan.n_units,)
    assert np.isfinite(found.values).all()
    for group in plan.groups:
        assert (found.of(plan, group.name) > 0).any(), group.name
    assert (found.curve is None) == (scheduler is None)


def test_variant_ddpm_prune_is_torch_prunings_taylor_importance() -> None:
    """Group by group, wherever both agree on what a group is (attention's q, k and v: torch-pruning makes them one)."""
    import torch_pruning

    torch.manual_seed(0)
    model = small_unet().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    plan, x, timesteps = trace(model), batch_for(model).float(), [0, 7, 100]
    found = score(
        model, [x], plan, estimator="reference", variant="ddpm_prune", timesteps=timesteps, seed=1, progress=False
    )

    objective = make_objective(model)
    noise = objective.noise(x, generator_for(1, NOISE, 0))
    for t in timesteps:
        objective.loss(model, x, t, noise).backward()
    graph = torch_pruning.DependencyGraph().build_dependency(
        model, example_inputs={"sample": x, "timestep": torch.zeros(2)}
    )
    importance = torch_pruning.importance.GroupTaylorImportance()
    modules, compared = dict(model.named_modules()), 0
    for group in plan.groups:
        root = next(m for m in group.members if m.dim == 0 and len(plan.shapes[m.parameter]) > 1)
        owner = root.parameter.removesuffix(".weight")
        if ".to_" in owner and "to_out" not in owner:
            continue
        prune = f"prune_{'conv' if isinstance(modules[owner], nn.Conv2d) else 'linear'}_out_channels"
        channels = list(range(plan.shapes[root.parameter][0]))
        theirs = importance(graph.get_pruning_group(modules[owner], getattr(torch_pruning, prune), channels)).numpy()
        np.testing.assert_allclose(found.of(plan, group.name), theirs[root.index[:, 0]], rtol=1e-5, err_msg=owner)
        compared += 1
    assert compared > 20


@pytest.mark.parametrize("case", list(MODELS.values())[:2], ids=list(MODELS)[:2])
def test_gradient_checkpointing_does_not_change_the_scores(case: tuple[Any, Any, list[int]]) -> None:
    make, scheduler, timesteps = case
    torch.manual_seed(0)
    model = make().double().eval()
    plan, batch = trace(model), batch_for(model)
    options: dict[str, Any] = {"scheduler": scheduler, "timesteps": timesteps, "progress": False}
    options |= {"micro_batch": 2, "min_samples": 4, "max_samples": 4}
    plain = score(model, [batch], plan, **options)
    model.enable_gradient_checkpointing()
    again = score(model, [batch], plan, **options)
    np.testing.assert_allclose(again.values, plain.values, rtol=1e-9)
    assert all(m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing"))
