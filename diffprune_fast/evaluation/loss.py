"""The training loss on images that were not trained on."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import nn

from ..objective.checks import check_batch
from ..objective.forms import as_batch
from ..objective.image_range import check_range_by_loss
from ..objective.isolation import in_mode, unwrapped
from ..objective.loss import LossFunction, images_of, make_objective
from ..objective.nested import map_tensors, moved
from ..objective.randomness import generator_for, stratified


@torch.no_grad()
def diffusion_loss(
    model: nn.Module,
    batch: Any,
    scheduler: Any = None,
    *,
    passes: int = 4,
    batch_size: int = 128,
    loss_fn: LossFunction | None = None,
    seed: int = 0,
) -> float:
    """Mean training loss over all images of ``batch``, at timesteps and with noise that depend on ``seed`` alone.

    Two models can be compared at the same seed: their timesteps and noise are the same.

    Args:
        model: a denoiser or an autoencoder.
        batch: what a loader would yield, of any length: ``(n, channels, height, width)`` images, an ``(images,
            labels)`` pair, or a dict with conditioning inputs.
        scheduler: the one of the training; None is ``DDPMScheduler()``.
        passes: how often each image is used, every time with another timestep and noise. Timesteps are stratified: a
            pass takes one from each of ``n`` equal strips.
        batch_size: images of one forward; the loss doesn't depend on it.
        loss_fn: ``(model, batch, t, noise) -> (batch,) or scalar`` in place of the scheduler's objective.
        seed: of timesteps and noise.

    Returns:
        The mean over images and passes.

    Raises:
        ValueError: there is no image or no pass.
        FloatingPointError: the loss is not finite.

    Example:
        >>> class Silent(nn.Conv2d):
        ...     def forward(self, sample, timestep):
        ...         return 0 * super().forward(sample)
        >>> images = torch.rand(64, 3, 8, 8) * 2 - 1
        >>> round(diffusion_loss(Silent(3, 3, 1), images), 1)  # the mean square of the noise itself
        1.0
    """
    objective = make_objective(model, scheduler, loss_fn)
    batch = as_batch(batch)
    images = images_of(batch)
    n = len(images)
    if n == 0 or passes < 1:
        raise ValueError(f"{n} images and {passes} passes: the loss needs at least one of each")
    check_batch(unwrapped(model), batch, loss_fn)
    check_range_by_loss(unwrapped(model), objective, batch)
    device = next(model.parameters()).device
    generator = generator_for(seed)
    total = 0.0
    with in_mode(model, training=False):
        for _ in range(passes):
            t = stratified(np.arange(objective.n_timesteps), n, generator)
            noise = objective.noise(batch, generator)
            for start in range(0, n, batch_size):
                rows = slice(start, min(start + batch_size, n))
                part = moved(_rows(batch, rows, n), device)
                loss = objective.loss(model, part, t[rows].to(device), noise[rows].to(device))
                total += float(loss) * (rows.stop - rows.start)
    mean = total / (n * passes)
    if not np.isfinite(mean):
        raise FloatingPointError(f"the loss of {type(model).__name__} is {mean}: look for NaN in its weights or images")
    return mean


@torch.no_grad()
def loss_by_timestep(
    model: nn.Module,
    batch: Any,
    scheduler: Any = None,
    *,
    strata: int = 10,
    batch_size: int = 128,
    loss_fn: LossFunction | None = None,
    seed: int = 0,
) -> list[tuple[int, float]]:
    """The mean training loss in each of ``strata`` equal parts of the timesteps, over all images of ``batch``.

    Args:
        model, batch, scheduler, batch_size, loss_fn, seed: as for :func:`diffusion_loss`. Images have the same noise in
            every part.
        strata: parts; not more than there are timesteps.

    Returns:
        The first timestep of each part, and the loss there.

    Raises:
        ValueError: there is no image or no part.

    Example:
        >>> from diffusers import UNet2DModel
        >>> unet = UNet2DModel(8, block_out_channels=(8,), down_block_types=("DownBlock2D",),
        ...                    up_block_types=("UpBlock2D",), norm_num_groups=4)
        >>> [t for t, _ in loss_by_timestep(unet, torch.zeros(4, 3, 8, 8), strata=4)]
        [0, 250, 500, 750]
    """
    objective = make_objective(model, scheduler, loss_fn)
    n, strata = len(images_of(batch)), min(strata, objective.n_timesteps)
    if n == 0 or strata < 1:
        raise ValueError(f"{n} images and {strata} parts: the loss needs at least one of each")
    device, generator = next(model.parameters()).device, generator_for(seed)
    noise = objective.noise(batch, generator)
    bounds = np.linspace(0, objective.n_timesteps, strata + 1).round().astype(int).tolist()
    found = []
    with in_mode(model, training=False):
        for first, stop in itertools.pairwise(bounds):
            t, total = stratified(np.arange(first, stop), n, generator), 0.0
            for start in range(0, n, batch_size):
                rows = slice(start, min(start + batch_size, n))
                part = moved(_rows(batch, rows, n), device)
                loss = objective.loss(model, part, t[rows].to(device), noise[rows].to(device))
                total += float(loss) * (rows.stop - rows.start)
            found.append((first, total / n))
    return found


def _rows(batch: Any, rows: slice, n: int) -> Any:
    """These rows of every tensor that has one per image."""
    return map_tensors(batch, lambda x: x[rows] if x.ndim and len(x) == n else x)
