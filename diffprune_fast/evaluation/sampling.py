"""Images from a fixed noise, so that two models can be compared picture by picture."""

from __future__ import annotations

import copy
import difflib
from typing import Any

import torch
from torch import Tensor, nn

from ..choices import Cache, Spacing, check_choice
from ..objective.isolation import in_mode
from ..objective.loss import first_tensor
from ..objective.randomness import own_randomness
from .caching import cached
from .quadratic import QuadraticDDIM


def sampler(scheduler: Any, steps: int, solver: str | None = None, spacing: Spacing = "uniform") -> Any:
    """A sampler for what ``scheduler`` trained: DDIM, or the scheduler's own ODE steps for flows.

    solver: the name of another scheduler of diffusers, such as ``"DPMSolverMultistepScheduler"``. spacing: of DDIM's
    timesteps.

    Raises ValueError for less than one step, a solver that isn't known, and a spacing that isn't the solver's.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}: ask for at least one denoising step")
    check_choice("spacing", spacing, Spacing)
    if spacing == "quadratic":
        if solver not in (None, "DDIM", "DDIMScheduler") or not _is_discrete(scheduler):
            raise ValueError("spacing='quadratic' is for DDIM, of a model that wasn't trained by flow matching")
        return QuadraticDDIM(scheduler, steps)
    from diffusers import DDIMScheduler  # 1.5 s, which who doesn't sample is spared

    if solver is not None:
        ours = scheduler_class(solver).from_config(scheduler.config)
    else:
        ours = DDIMScheduler.from_config(scheduler.config) if _is_discrete(scheduler) else copy.deepcopy(scheduler)
    ours.set_timesteps(steps)
    return ours


def scheduler_class(name: str) -> Any:
    """The scheduler of diffusers of that name, with or without "Scheduler" at its end. Raises ValueError."""
    import diffusers

    for full in (name, f"{name}Scheduler"):
        found = getattr(diffusers, full, None) if full.isidentifier() else None
        if isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin):
            return found
    known = sorted(n for n in dir(diffusers) if n.endswith("Scheduler") and not n.startswith("Flax"))
    near = [n for n in known if name.lower() in n.lower()][:4] or difflib.get_close_matches(name, known, 3, cutoff=0.3)
    raise ValueError(f"{name!r} is no scheduler of diffusers: did you mean {' or '.join(near) or known[0]}?")


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
    clamp: float | None = 1.0,
    solver: str | None = None,
    spacing: Spacing = "uniform",
    cache: Cache | Any | None = None,
    **conditioning: Any,
) -> Tensor:
    """Images that ``model`` makes of ``noise``: the same noise gives the same images, on the noise's device.

    Args:
        model: a denoiser.
        scheduler: the one that it was trained with. Schedulers without ``alphas_cumprod`` (flow matching) take their
            own steps, others DDIM's.
        noise: ``(n, channels, height, width)``, standard normal.
        steps: calls of the model for each image.
        labels: ``(n,)`` class labels, or None.
        batch_size: images of one forward.
        clamp: the images' largest absolute value; None doesn't clamp.
        solver: the name of another scheduler of diffusers to sample with, such as ``"DPMSolverMultistep"``; one that
            draws noise of its own draws the same every time.
        spacing: ``"quadratic"`` puts DDIM's timesteps closer together where there is little noise.
        cache: ``"first-block"``, ``"pyramid-attention"`` or ``"faster-cache"``, or the config of such: one of
            diffusers' caches, which leave out blocks or attentions that change little from step to step. None: none.
        conditioning: further keyword arguments of the model's forward; tensors of ``n`` rows are split with the noise.

    Returns:
        ``(n, channels, height, width)`` in the noise's dtype, clamped to [-1, 1], or [-clamp, clamp].

    Raises:
        ValueError: ``steps`` or ``batch_size`` is below 1, a name isn't known, or a cache doesn't know the model's
            blocks.
        FloatingPointError: the images are not finite.

    Example:
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> unet = UNet2DModel(8, block_out_channels=(8,), down_block_types=("DownBlock2D",),
        ...                    up_block_types=("UpBlock2D",), norm_num_groups=4)
        >>> sample(unet, DDPMScheduler(), torch.randn(2, 3, 8, 8), steps=3).shape
        torch.Size([2, 3, 8, 8])

    Source: DDIM with eta 0, Song et al., 2021 (arXiv 2010.02502).
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
    if labels is not None:
        conditioning = {**conditioning, "class_labels": labels}
    parts = []
    with in_mode(model, training=False), own_randomness(0):
        for start in range(0, len(noise), batch_size):
            rows = slice(start, start + batch_size)
            own = {k: v[rows] if _per_image(v, len(noise)) else v for k, v in conditioning.items()}
            with cached(model, cache):
                parts.append(_denoise(model, sampler(scheduler, steps, solver, spacing), noise[rows], own))
    images = torch.cat(parts)
    if not torch.isfinite(images).all():
        raise FloatingPointError(f"{type(model).__name__} made NaN or infinite images: its weights are not usable")
    return images if clamp is None else images.clamp(-clamp, clamp)


def _per_image(value: Any, n: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == n


def _denoise(model: nn.Module, scheduler: Any, noise: Tensor, conditioning: dict[str, Any]) -> Tensor:
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        predicted = first_tensor(model(scaled, t.to(x.device).expand(len(x)), **conditioning))
        if predicted.shape[1] == 2 * x.shape[1]:
            predicted = predicted.chunk(2, dim=1)[0]  # the second half is a learned variance
        x = scheduler.step(predicted, t, x).prev_sample
    return x
