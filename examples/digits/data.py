"""scikit-learn's handwritten digits as training images: 8x8 scans, enlarged to 16x16, in [-1, 1]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

SIZE = 16
HELD_OUT = 0.2


@dataclass(frozen=True)
class Digits:
    """images: ``(n, 1, 16, 16)`` float32 in [-1, 1]. labels: ``(n,)`` int64, 0 to 9."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)


def digits(*, seed: int = 0) -> tuple[Digits, Digits]:
    """The images to train on and the fifth that is held out, split by ``seed``."""
    raw = load_digits()
    images = torch.from_numpy(raw.images).float().unsqueeze(1) / 16
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bicubic", align_corners=False).clamp(0, 1) * 2 - 1
    labels = torch.from_numpy(raw.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_out = order[: round(HELD_OUT * len(images))]
    train = order[len(held_out) :]
    return Digits(images[train], labels[train]), Digits(images[held_out], labels[held_out])


def shifted(images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Every image moved by up to one pixel each way: few images are not so soon learned by heart."""
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    n, height, width = len(images), images.shape[-2], images.shape[-1]
    top, left = torch.randint(0, 3, (2, n, 1), generator=generator)
    rows = (top + torch.arange(height))[:, :, None]
    columns = (left + torch.arange(width))[:, None, :]
    return padded[torch.arange(n)[:, None, None], :, rows, columns].permute(0, 3, 1, 2).contiguous()
