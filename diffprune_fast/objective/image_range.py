"""Images from 0 to 1 where the model was trained on -1 to 1: the model's own loss says so, where it can."""

from __future__ import annotations

import functools
import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .batches import count, part
from .checks import in_channels
from .isolation import in_mode
from .loss import Objective, dtype_of, images_of
from .nested import map_tensors, moved
from .randomness import generator_for, own_randomness, stratified

_log = logging.getLogger(__name__)

# Images that are looked at, and the fewest that nothing below 0 is noticed of.
MOST, FEWEST = 16, 4

# Of the timesteps, from the least noisy on: there the loss depends on what is in the images.
SMALL_T = 0.1

# How many times lower the loss of the same images has to be once they are mapped to -1 to 1. It was 6.1 at t = 5 for
# digits given from 0 to 1; 0.8 for photographs, and 0.5 for photographs as they are that have no value below 0: to a
# model of photographs both are pale ones.
SURE = 1.5

# The place in the seed's tree.
PLACE = 6


def check_range_by_loss(model: nn.Module, objective: Objective, batch: Any) -> None:
    """Raise ValueError for images from 0 to 1 of which the model would rather have 2 x - 1.

    Where all values are from 0 to 1 the losses at small t of both are compared, on up to 16 images with the same noise.
    Where they don't tell, that is said once in the log. A ``loss_fn`` knows its own range and isn't looked at.
    """
    images = images_of(batch)
    if objective.kind in ("loss_fn", "reconstruction") or in_channels(model) not in (1, 3):
        return
    if count(batch) < FEWEST or float(images.amin()) < 0 or not 0.5 < float(images.amax()) <= 1:
        return
    as_given, mapped = _losses(model, objective, part(batch, 0, MOST))
    if as_given > SURE * mapped:
        raise ValueError(
            f"the loader's images go from {float(images.amin()):g} to {float(images.amax()):g}, and the model's loss "
            f"at small t is {as_given:.3g} for them, {mapped:.3g} for 2 * images - 1: give images in [-1, 1], as the "
            "model was trained on (if these are right: loss_fn=make_objective(model, scheduler).loss)"
        )
    _say(f"{as_given:.3g}", f"{mapped:.3g}")


@torch.no_grad()
def _losses(model: nn.Module, objective: Objective, batch: Any) -> tuple[float, float]:
    """The mean loss at small t of the batch as it is, and with its images mapped from 0…1 to -1…1."""
    device = next(model.parameters()).device
    images, n = images_of(batch), count(batch)
    noise = objective.noise(batch, generator_for(0, PLACE, 0)).to(device)
    early = np.arange(max(1, round(SMALL_T * objective.n_timesteps)))
    t = stratified(early, n, generator_for(0, PLACE, 1)).to(device)

    def loss(change: Any) -> float:
        given = moved(map_tensors(batch, lambda x: change(x) if x is images else x), device)
        with own_randomness(0):
            return float(objective.loss(model, given, t, noise))

    def wide(x: Tensor) -> Tensor:
        return x.to(torch.float64 if dtype_of(model) == torch.float64 else torch.float32)

    with in_mode(model, training=False):
        return loss(wide), loss(lambda x: 2 * wide(x) - 1)


@functools.cache
def _say(as_given: str, mapped: str) -> None:
    _log.warning(
        "the loader's images have no value below 0 (the model's loss at small t is %s for them, %s for 2 * images - 1, "
        "which doesn't tell): if they are from 0 to 1, map them to [-1, 1]",
        as_given,
        mapped,
    )
