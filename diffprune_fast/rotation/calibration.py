"""The noisy images that heads are looked at with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..objective.batches import Batches, count
from ..objective.loss import Objective
from ..objective.nested import moved
from ..objective.randomness import early_timesteps, generator_for

# The place in the seed's tree, beside those of scoring.
PLACE = 7


def draw(
    objective: Objective, batches: Batches, samples: int, micro_batch: int, seed: int, device: torch.device
) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Micro-batches of images, timesteps and noise, the same on any number of ranks."""
    t = early_timesteps(objective.n_timesteps, samples, generator_for(seed, PLACE, 0))
    done = 0
    while done < samples:
        batch = moved(batches.take(min(micro_batch, samples - done)), device)
        noise = objective.noise(batch, generator_for(seed, PLACE, 1 + done))
        yield batch, t[done : done + count(batch)].to(device), noise
        done += count(batch)
