"""A folder of pictures, with captions or classes if need be, as training images for those without a data pipeline."""

from __future__ import annotations

import csv
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


# As the imagefolder format of datasets has it: one entry for each image, with file_name and the caption.
METADATA = ("metadata.jsonl", "metadata.csv")


CAPTION_KEYS = ("text", "caption", "prompt")


# What shows through transparent pixels.
BACKGROUND = (255, 255, 255, 255)


class ImageFolder:
    """Batches of the images below ``folder``, shuffled by ``seed``: ``(batch, channels, height, width)`` in [-1, 1].

    Images are turned as their EXIF says, scaled until they cover ``size`` (height, width) and cut to its middle; one
    channel is greyscale, 16 bits are scaled, transparent pixels are white.
    captions: batches are ``(images, captions)``; each image's caption is in ``metadata.jsonl`` or ``metadata.csv``
    beside it or above (``{"file_name": "a.png", "text": "a cat"}``), or in a text file of its name (``a.txt``).
    labels: batches are ``(images, labels)``; the folders right below ``folder``, in order of name, are the classes.
    skip_unreadable: leave out files that can't be read; ``skipped`` has them. Every image is read once to know.

    Raises ValueError for a folder without images, for channels other than 1 and 3, for a file that can't be read or is
    too large to be a picture, for an image without a caption and for one in no class.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        size: tuple[int, int],
        channels: int = 3,
        batch_size: int = 32,
        seed: int = 0,
        captions: bool = False,
        labels: bool = False,
        skip_unreadable: bool = False,
    ) -> None:
        if channels not in (1, 3):
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
        self.size, self.channels, self.batch_size = size, channels, batch_size
        self.skipped = tuple(path for path in paths if not self._is_readable(path)) if skip_unreadable else ()
        paths = [path for path in paths if path not in self.skipped]
        if not paths:
            raise ValueError(f"none of the {len(self.skipped)} images in {folder} can be read")
        order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed))
        self.paths = [paths[i] for i in order.tolist()]
        self.beside: Mapping[Path, Any] | None = None
        if captions:
            self.beside = _captions(Path(folder), self.paths)
        elif labels:
            self.beside = _labels(Path(folder), self.paths)

    def __len__(self) -> int:
        return -(-len(self.paths) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor | tuple[Tensor, Any]]:
        for start in range(0, len(self.paths), self.batch_size):
            paths = self.paths[start : start + self.batch_size]
            images = torch.stack([self.read(path) for path in paths])
            if self.beside is None:
                yield images
            else:
                beside = [self.beside[path] for path in paths]
                yield images, torch.tensor(beside) if isinstance(beside[0], int) else beside

    def shuffled(self, workers: int = 0) -> DataLoader[Any]:
        """The same as a loader for training: in another order in every pass, whole batches, read by ``workers``
        processes."""
        return DataLoader(
            Samples(self),
            self.batch_size,
            shuffle=True,
            drop_last=len(self.paths) >= self.batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
        )

    def read(self, path: Path) -> Tensor:
        """One image, ``(channels, height, width)`` float32 in [-1, 1]."""
        height, width = self.size
        planes = _planes(_decoded(path), self.channels)
        scale = max(height / planes[0].height, width / planes[0].width)
        covering = (max(width, round(planes[0].width * scale)), max(height, round(planes[0].height * scale)))
        left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
        box = (left, top, left + width, top + height)
        cut = [plane.resize(covering, Image.Resampling.LANCZOS).crop(box) for plane in planes]
        pixels = np.stack([np.asarray(plane, np.float32).clip(0, 255) for plane in cut]) / 127.5 - 1
        return torch.from_numpy(pixels).expand(self.channels, -1, -1).contiguous()

    def _is_readable(self, path: Path) -> bool:
        try:
            self.read(path)
        except ValueError:
            return False
        return True


class Samples(Dataset[Any]):
    """The images of a folder one by one, with what stands beside each."""

    def __init__(self, folder: ImageFolder) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return len(self.folder.paths)

    def __getitem__(self, index: int) -> Any:
        path = self.folder.paths[index]
        image = self.folder.read(path)
        return image if self.folder.beside is None else (image, self.folder.beside[path])


def _decoded(path: Path) -> Image.Image:
    """The picture in ``path``, upright. Raises ValueError naming it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                opened.load()
                return ImageOps.exif_transpose(opened)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise ValueError(f"{path} is too large for a picture ({e}): scale it down or remove it") from e
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as e:
        raise ValueError(f"{path} can't be read as an image ({e}): remove or repair it") from e


def _planes(image: Image.Image, channels: int) -> list[Image.Image]:
    """One image for each channel, or one for all that are alike, with values from 0 to 255."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float32)
        most = 65535.0 if image.mode.startswith("I") else 1.0
        if values.min() < 0 or values.max() > most:
            raise ValueError(
                f"{image.filename if hasattr(image, 'filename') else 'an image'} has values from {values.min():g} to "
                f"{values.max():g}, where {image.mode} goes from 0 to {most:g}: convert it to 8 or 16 bits"
            )
        return [Image.fromarray(values * np.float32(255 / most))]
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, BACKGROUND), over)
    return list(image.convert("L" if channels == 1 else "RGB").split())


def _labels(folder: Path, paths: Iterable[Path]) -> dict[Path, int]:
    """Every image's class. Raises ValueError naming the first image that is in none."""
    names = {path: path.relative_to(folder).parts for path in paths}
    alone = next((path for path, parts in names.items() if len(parts) < 2), None)
    if alone is not None:
        raise ValueError(f"{alone} is in no class: the folders right below {folder} are the classes")
    number = {name: i for i, name in enumerate(sorted({parts[0] for parts in names.values()}))}
    return {path: number[parts[0]] for path, parts in names.items()}


def _captions(folder: Path, paths: list[Path]) -> dict[Path, str]:
    """Every image's caption. Raises ValueError naming the first image that has none."""
    known: dict[Path, str] = {}
    for file in (file for name in METADATA for file in folder.rglob(name)):
        for number, entry in _entries(file):
            try:
                text = next((entry[k] for k in CAPTION_KEYS if isinstance(entry.get(k), str)), None)
                if text is not None:
                    known[file.parent / entry["file_name"]] = text
            except (AttributeError, KeyError, TypeError) as e:
                raise ValueError(f"{file}, line {number}, has no file_name and text ({e})") from e
    for path in paths:
        beside = path.with_suffix(".txt")
        if path not in known and not beside.is_file():
            raise ValueError(
                f"{path} has no caption: write it into {beside.name}, or into {METADATA[0]} as "
                f'{{"file_name": "{path.name}", "text": ...}}'
            )
        if path not in known:
            known[path] = beside.read_text(encoding="utf-8").strip()
    return known


def _entries(file: Path) -> Iterator[tuple[int, Any]]:
    """The lines of a metadata file with their numbers. Raises ValueError naming the first that isn't JSON."""
    with file.open(encoding="utf-8", newline="") as lines:
        if file.suffix == ".csv":
            yield from enumerate(csv.DictReader(lines), 2)
            return
        for number, line in enumerate(lines, 1):
            try:
                yield number, json.loads(line) if line.strip() else {}
            except ValueError as e:
                raise ValueError(f"{file}, line {number}, is no JSON object with file_name and text ({e})") from e
