"""Images from a fixed noise, so that two models can be compared picture by picture."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from ..objective.isolation import in_mode
from ..objective.loss import first_tensor


def sampler(scheduler: Any, steps: int) -> Any:
    """A deterministic sampler for what ``scheduler`` trained: DDIM, or the scheduler's own ODE steps for flows."""
    if steps < 1:
        raise ValueError(f"steps is {steps}: ask for at least one denoising step")
    ours = DDIMScheduler.from_config(scheduler.config) if _is_discrete(scheduler) else copy.deepcopy(scheduler)
    ours.set_timesteps(steps)
    return ours


def _is_discrete(scheduler: Any) -> bool:
    return getattr(scheduler, "alphas_cumprod", None) is not None


@torch.no_grad()
def sample(
    model: nn.Module,
    scheduler: Any,
    noise: Tensor,
    *,
    steps: int = 50,
    labels: Tensor | None = None,
    batch_size: int = 128,
    **conditioning: Any,
) -> Tensor:
    """Images that ``model`` makes of ``noise``: the same noise gives the same images, on the noise's device.

    noise: ``(n, channels, height, width)``, standard normal. labels: ``(n,)`` class labels, or None. conditioning:
    further keyword arguments of the model's forward; tensors of ``n`` rows are split with the noise.
    Returns ``(n, channels, height, width)`` in the noise's dtype, clamped to [-1, 1].

    Sampling is DDIM with eta 0 (Song et al., 2021, arXiv 2010.02502); schedulers without ``alphas_cumprod`` (flow
    matching) take their own steps. Raises ValueError when ``steps`` or ``batch_size`` is below 1, and
    FloatingPointError when the images are not finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
    if labels is not None:
        conditioning = {**conditioning, "class_labels": labels}
    parts = []
    with in_mode(model, training=False):
        for start in range(0, len(noise), batch_size):
            rows = slice(start, start + batch_size)
            own = {k: v[rows] if _per_image(v, len(noise)) else v for k, v in conditioning.items()}
            parts.append(_denoise(model, sampler(scheduler, steps), noise[rows], own))
    images = torch.cat(parts)
    if not torch.isfinite(images).all():
        raise FloatingPointError(f"{type(model).__name__} made NaN or infinite images: its weights are not usable")
    return images.clamp(-1, 1)


def _per_image(value: Any, n: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == n


def _denoise(model: nn.Module, scheduler: Any, noise: Tensor, conditioning: dict[str, Any]) -> Tensor:
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        predicted = first_tensor(model(scaled, t.to(x.device).expand(len(x)), **conditioning))
        x = scheduler.step(predicted, t, x).prev_sample
    return x
