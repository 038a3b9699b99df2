"""DDIM at quadratic timesteps, which diffusers lacks: more of them where there is little noise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..objective.conditioning import config_of

# The share of the training's timesteps whose square root is divided evenly, in the code of DDIM.
SHARE = 0.8


class QuadraticDDIM:
    """A sampler for what ``scheduler`` trained, of at most ``steps`` steps; it knows what ``sample`` asks of one.

    Source: Song et al., 2021 (arXiv 2010.02502), appendix D.2; the sampler of Diff-Pruning's experiments.
    """

    init_noise_sigma = 1.0

    def __init__(self, scheduler: Any, steps: int) -> None:
        config = config_of(scheduler)
        self._kind = config.get("prediction_type") or "epsilon"
        self._clip = float(config.get("clip_sample_range") or 1.0) if config.get("clip_sample") else None
        self._alphas = torch.as_tensor(scheduler.alphas_cumprod, dtype=torch.float64)
        rising = np.unique((np.linspace(0, np.sqrt(len(self._alphas) * SHARE), steps) ** 2).astype(np.int64))
        self.timesteps = torch.from_numpy(rising[::-1].copy())
        self._before = dict(zip(rising.tolist(), [-1, *rising[:-1].tolist()]))

    def step(self, predicted: Tensor, t: Tensor, x: Tensor) -> Any:
        """``prev_sample``: the image with the noise of the next timestep."""
        before = self._before[int(t)]
        now, then = float(self._alphas[int(t)]), float(self._alphas[before]) if before >= 0 else 1.0
        signal, sigma = now**0.5, (1 - now) ** 0.5
        match self._kind:
            case "v_prediction":
                image, noise = signal * x - sigma * predicted, signal * predicted + sigma * x
            case "sample":
                image, noise = predicted, (x - signal * predicted) / sigma
            case _:
                image, noise = (x - sigma * predicted) / signal, predicted
        if self._clip is not None:
            image = image.clamp(-self._clip, self._clip)
        return SimpleNamespace(prev_sample=then**0.5 * image + (1 - then) ** 0.5 * noise)
