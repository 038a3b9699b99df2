"""Fréchet distances in the features of a small classifier that is trained on the models' own images.

Inception's features say little about 16x16 images; these know digits from each other, or photographs. The distances
compare models of the same images with each other and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 32
REFERENCE = 2048


class Features:
    """A classifier, trained when made. ``accuracy``: on the held-out images.

    train, held_out: with ``images`` and ``labels``. augmented: what is done to images before they are learned from.
    """

    def __init__(
        self, train: Any, held_out: Any, augmented: Callable[..., Tensor], *, steps: int = 600, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._features = _features(train.images.shape[1])
            out = nn.Linear(FEATURES, int(train.labels.max()) + 1)
        optimizer = torch.optim.Adam([*self._features.parameters(), *out.parameters()], lr=2e-3)
        for _ in range(steps):
            images, labels = _drawn(augmented, train, 64, generator)
            loss = F.cross_entropy(out(self._features(images)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            right = out(self._features(held_out.images)).argmax(1) == held_out.labels
        self.accuracy = float(right.float().mean())
        self._mean, self._covariance = self._moments(_drawn(augmented, train, REFERENCE, generator)[0])

    @torch.no_grad()
    def _moments(self, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
        features = self._features(images).double().numpy()
        return features.mean(0), np.cov(features, rowvar=False)

    def frechet(self, images: Tensor) -> float:
        """The Fréchet distance of these images' features to those of images to train on (Heusel et al., 2017)."""
        mean, covariance = self._moments(images)
        root = np.real(scipy.linalg.sqrtm(covariance @ self._covariance))
        apart = float(np.square(mean - self._mean).sum())
        return apart + float(np.trace(covariance + self._covariance - 2 * root))


def _features(channels: int) -> nn.Sequential:
    """``(n, channels, 16, 16)`` to ``(n, 32)``."""
    convs = (nn.Conv2d(channels, 32, 3, stride=2, padding=1), nn.Conv2d(32, 32, 3, stride=2, padding=1))
    return nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), nn.Flatten(), nn.Linear(512, FEATURES))


def _drawn(augmented: Callable[..., Tensor], data: Any, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    chosen = torch.randint(0, len(data), (n,), generator=generator)
    return augmented(data.images[chosen], generator=generator), data.labels[chosen]
