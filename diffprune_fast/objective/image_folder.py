"""A folder of pictures, with captions if need be, as training images for those who have no data pipeline at hand."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


# As the imagefolder format of datasets has it: one JSON object a line, with file_name and the caption.
METADATA = "metadata.jsonl"


CAPTION_KEYS = ("text", "caption", "prompt")


_MODES = {1: "L", 3: "RGB"}


class ImageFolder:
    """Batches of the images below ``folder``, shuffled by ``seed``: ``(batch, channels, height, width)`` in [-1, 1].

    Images are scaled until they cover ``size`` (height, width) and cut to its middle; one channel is greyscale.
    captions: batches are ``(images, captions)``; each image's caption is in ``metadata.jsonl`` beside it or above
    (``{"file_name": "a.png", "text": "a cat"}``), or in a text file of its name (``a.txt``).

    Raises ValueError for a folder without images, for channels other than 1 and 3, for a file that can't be read and
    for an image without a caption.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        size: tuple[int, int],
        channels: int = 3,
        batch_size: int = 32,
        seed: int = 0,
        captions: bool = False,
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
        self.captions = _captions(Path(folder), self.paths) if captions else None

    def __len__(self) -> int:
        return -(-len(self.paths) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor | tuple[Tensor, list[str]]]:
        for start in range(0, len(self.paths), self.batch_size):
            paths = self.paths[start : start + self.batch_size]
            images = torch.stack([self.read(path) for path in paths])
            yield images if self.captions is None else (images, [self.captions[path] for path in paths])

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


def _captions(folder: Path, paths: list[Path]) -> dict[Path, str]:
    """Every image's caption. Raises ValueError naming the first image that has none."""
    known: dict[Path, str] = {}
    for file in folder.rglob(METADATA):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                entry = json.loads(line) if line.strip() else {}
                text = next((entry[k] for k in CAPTION_KEYS if isinstance(entry.get(k), str)), None)
                if text is not None:
                    known[file.parent / entry["file_name"]] = text
            except (ValueError, AttributeError, KeyError, TypeError) as e:
                raise ValueError(f"{file}, line {number}, is no JSON object with file_name and text ({e})") from e
    for path in paths:
        beside = path.with_suffix(".txt")
        if path not in known and not beside.is_file():
            raise ValueError(
                f"{path} has no caption: write it into {beside.name}, or into {METADATA} as "
                f'{{"file_name": "{path.name}", "text": ...}}'
            )
        if path not in known:
            known[path] = beside.read_text(encoding="utf-8").strip()
    return known
