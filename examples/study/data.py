"""Small RGB patches of photographs: those that scikit-learn and scikit-image bring with them, in [-1, 1]."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 16
# Photographs are scaled to so many rows: a patch then shows a part of a thing, not a piece of smooth surface.
ROWS = 192
STRIDE = 4
HELD_OUT = 0.2
HELD_OUT_PER_PHOTOGRAPH = 100
NAMES = ("astronaut", "coffee", "chelsea", "rocket", "retina", "hubble_deep_field", "immunohistochemistry")


@dataclass(frozen=True)
class Patches:
    """images: ``(n, 3, 16, 16)`` float32 in [-1, 1]. labels: ``(n,)`` int64, which photograph."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)


def photographs() -> list[Tensor]:
    """Ten photographs as ``(3, 192, width)`` float32 in [-1, 1]."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    raw = [*load_sample_images().images, *(getattr(skimage.data, name)() for name in NAMES)]
    raw.append(skimage.data.stereo_motorcycle()[0])
    return [_scaled(image) for image in raw]


def _scaled(image: np.ndarray) -> Tensor:
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()[None] / 127.5 - 1
    width = round(ROWS * x.shape[3] / x.shape[2])
    return F.interpolate(x, size=(ROWS, width), mode="bilinear", antialias=True, align_corners=False)[0]


def photo_patches(*, seed: int = 0) -> tuple[Patches, Patches]:
    """Patches of the photographs' left four fifths to train on, and of their right fifths, held out.

    Patches to train on lie on a grid of 4 pixels; a hundred a photograph are held out, at places fixed by ``seed``.
    """
    generator = torch.Generator().manual_seed(seed)
    train, held_out = [], []
    for image in photographs():
        edge = round((1 - HELD_OUT) * image.shape[2])
        train.append(_patches(image[:, :, :edge], STRIDE))
        right = _patches(image[:, :, edge:], 1)
        held_out.append(right[torch.randperm(len(right), generator=generator)[:HELD_OUT_PER_PHOTOGRAPH]])
    return _together(train), _together(held_out)


def flipped(images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Half of the images, drawn at random, mirrored left to right."""
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def _patches(image: Tensor, stride: int) -> Tensor:
    windows = image.unfold(1, SIZE, stride).unfold(2, SIZE, stride)
    return windows.permute(1, 2, 0, 3, 4).reshape(-1, 3, SIZE, SIZE)


def _together(parts: list[Tensor]) -> Patches:
    labels = torch.cat([torch.full((len(part),), i) for i, part in enumerate(parts)])
    return Patches(torch.cat(parts), labels)
