"""The forms in which people have their batches, as the one that everything else takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_batch(batch: Any) -> Any:
    """The batch with tensors in place of NumPy arrays and PIL images; everything else is as it was.

    PIL images, alone or in a list, become ``(n, channels, height, width)`` floats in [-1, 1], which diffusion models
    are trained on.

    Raises ValueError for PIL images of several sizes, which can't be one batch.
    """
    if isinstance(batch, np.ndarray) and batch.dtype.kind in "biufc":
        return torch.from_numpy(batch if batch.flags.writeable and batch.flags.c_contiguous else batch.copy())
    if _is_picture(batch):
        return _pixels(batch)[None]
    if isinstance(batch, Mapping):
        made = {k: as_batch(v) for k, v in batch.items()}
        return batch if all(made[k] is v for k, v in batch.items()) else made  # whose class may have further attributes
    if isinstance(batch, (list, tuple)) and batch and all(_is_picture(v) for v in batch):
        sizes = sorted({picture.size for picture in batch})
        if len(sizes) > 1:
            raise ValueError(f"a batch has PIL images of the sizes {sizes[:4]}: crop them to one")
        return torch.stack([_pixels(picture) for picture in batch])
    if isinstance(batch, (list, tuple)) and any(isinstance(v, (np.ndarray, Mapping)) or _nests(v) for v in batch):
        items = [as_batch(v) for v in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch


def _nests(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and _is_picture(value[0])


def _is_picture(value: Any) -> bool:
    try:
        from PIL import Image
    except ImportError:
        return False
    return isinstance(value, Image.Image)


def _pixels(picture: Any) -> Tensor:
    """``(channels, height, width)`` in [-1, 1]."""
    grey = picture.mode in ("1", "L", "LA", "I", "I;16", "F")
    pixels = torch.from_numpy(np.array(picture.convert("L" if grey else "RGB"), dtype=np.float32))
    return (pixels[None] if grey else pixels.movedim(-1, 0)) / 127.5 - 1
