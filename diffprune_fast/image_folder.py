"""A folder of pictures as training images, for those who have no data pipeline at hand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_MODES = {1: "L", 3: "RGB"}


class ImageFolder:
    """Batches of the images below ``folder``, shuffled by ``seed``: ``(batch, channels, height, width)`` in [-1, 1].

    Images are scaled until they cover ``size`` (height, width) and cut to its middle; one channel is greyscale.

    Raises ValueError for a folder without images, for channels other than 1 and 3, and for a file that can't be read.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        size: tuple[int, int],
        channels: int = 3,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        if channels not in _MODES:
            raise ValueError(
                f"the model takes {channels} channels, pictures have 1 or 3: a model of latents needs a loader of "
                "encoded images, from Python"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: give 1 or more")
        if not Path(folder).is_dir():
            raise ValueError(f"{folder} is not a folder of images")
        paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in SUFFIXES)
        if not paths:
            raise ValueError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
        order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed))
        self.paths = [paths[i] for i in order.tolist()]
        self.size, self.channels, self.batch_size = size, channels, batch_size

    def __len__(self) -> int:
        return -(-len(self.paths) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self.paths), self.batch_size):
            yield torch.stack([self.read(path) for path in self.paths[start : start + self.batch_size]])

    def read(self, path: Path) -> Tensor:
        """One image, ``(channels, height, width)`` float32 in [-1, 1]."""
        height, width = self.size
        try:
            with Image.open(path) as opened:
                image = opened.convert(_MODES[self.channels])
        except (UnidentifiedImageError, OSError, ValueError) as e:
            raise ValueError(f"{path} can't be read as an image ({e}): remove or repair it") from e
        scale = max(height / image.height, width / image.width)
        covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        image = image.resize(covering, Image.Resampling.LANCZOS)
        left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
        pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32) / 127.5 - 1
        return torch.from_numpy(pixels).reshape(height, width, self.channels).permute(2, 0, 1).contiguous()
