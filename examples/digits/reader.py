"""How good generated digits are: read by a classifier that was trained on the real ones."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Digits, shifted


class Reader:
    """Trained on ``data`` when made. Called with images and the digits that they should be."""

    def __init__(self, data: Digits, *, steps: int = 600, seed: int = 0) -> None:
        torch.manual_seed(seed)
        convs = (nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.Conv2d(32, 32, 3, stride=2, padding=1))
        self._features = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), nn.Flatten(), nn.Linear(512, 32))
        self._out = nn.Linear(32, 10)
        optimizer = torch.optim.Adam([*self._features.parameters(), *self._out.parameters()], lr=2e-3)
        for _ in range(steps):
            chosen = torch.randint(0, len(data), (64,))
            loss = F.cross_entropy(self._out(self._features(shifted(data.images[chosen]))), data.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor, real: Tensor) -> tuple[float, float]:
        """The share of ``images`` that are read as ``labels``; the Fréchet distance of their features to ``real``'s."""
        here, there = (self._features(x).double() for x in (images, real))
        right = (self._out(here.float()).argmax(1) == labels).double().mean()
        covariances = [np.cov(x.numpy(), rowvar=False) for x in (here, there)]
        root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
        apart = float((here.mean(0) - there.mean(0)).square().sum())
        return float(right), apart + float(np.trace(covariances[0] + covariances[1] - 2 * np.real(root)))
