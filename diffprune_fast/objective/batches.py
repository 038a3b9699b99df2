"""Endless micro-batches from whatever the user's loader is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .conditioning import SHARED, config_of, read_batch
from .loss import LossFunction, images_of
from .nested import tensors_in
from .ranks import compare_batch

# What a loader that can be walked only once may leave in memory, to be seen again.
CACHE_BYTES = 1 << 30


# No image in [0, 1] is as bright, and nearly all from 0 to 255 are brighter.
BRIGHTEST = 2.0


EMPTY = "the loader is empty: scoring needs at least one batch of images"


class Batches:
    """Batches of a loader, drawn for ever; its first batch is there, checked, before anything else happens.

    loader: any iterable of batches. A loader that is its own iterator (a generator) is walked once; what it yielded is
    kept (up to ``CACHE_BYTES``) and seen again. check: called with every batch; raises for a bad one.

    Raises ValueError for an empty loader, TypeError for something that isn't iterable.
    """

    def __init__(self, loader: Iterable[Any], check: Callable[[Any], None]) -> None:
        self._loader, self._check = replayed(as_loader(loader)), check
        self._iterator: Iterator[Any] = iter(self._loader)
        self._left: Any = None
        self.first = self._draw(empty=EMPTY)
        compare_batch(self.first)
        self._pending: list[Any] = [self.first]

    def take(self, size: int) -> Any:
        """The next ``size`` samples; fewer where batches can't be joined (images of another size, no tensors)."""
        while self._left is None or count(self._left) < size:
            batch = self._pending.pop() if self._pending else self._draw()
            joined = batch if self._left is None else join(self._left, batch)
            if joined is None:
                self._left, out = batch, self._left
                return out
            self._left = joined
        out, rest = part(self._left, 0, size), part(self._left, size, None)
        self._left = rest if count(rest) else None
        return out

    def _draw(self, empty: str | None = None) -> Any:
        for attempt in (0, 1):
            try:
                batch = next(self._iterator)
            except StopIteration:
                if attempt or empty:
                    break
                self._iterator = iter(self._loader)
                continue
            self._check(batch)
            return batch
        raise ValueError(
            empty
            or "the loader yielded nothing when it was walked a second time: pass a DataLoader or a list of batches, "
            "or one that holds max_samples images"
        )


class Replay:
    """A loader that can be walked only once, to be walked again and again: what it yielded is kept.

    Up to ``CACHE_BYTES`` (the first batch always); what found no room is seen by the first who gets there alone.
    """

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator
        self._kept: list[Any] = []
        self._room = CACHE_BYTES

    def __iter__(self) -> Iterator[Any]:
        yield from self._kept  # also what is kept while somebody else walks further
        for batch in self._iterator:
            size = sum(x.nbytes for x in tensors_in(batch))
            if size <= self._room or not self._kept:
                self._room -= size
                self._kept.append(batch)
            yield batch


def replayed(loader: Iterable[Any]) -> Iterable[Any]:
    """The loader, which may be walked any number of times also where it is its own iterator (a generator)."""
    return Replay(loader) if isinstance(loader, Iterator) else loader


def as_loader(loader: Any) -> Iterable[Any]:
    """The loader; a tensor is one batch. Raises TypeError for something that isn't an iterable of batches."""
    if isinstance(loader, Tensor):
        return [loader]
    if not isinstance(loader, Iterable) or isinstance(loader, (str, bytes, Mapping)):
        raise TypeError(f"loader must be an iterable of batches, such as a DataLoader; it is {type(loader).__name__}")
    return loader


def peeked(loader: Any) -> tuple[Any, Iterable[Any]]:
    """The first batch, and the loader as if nobody had looked. Raises ValueError for an empty loader."""
    loader = as_loader(loader)
    iterator = iter(loader)
    for first in iterator:
        return first, itertools.chain([first], iterator) if iterator is loader else loader
    raise ValueError(EMPTY)


def check_batch(model: nn.Module, batch: Any, loss_fn: LossFunction | None = None) -> None:
    """Raise ValueError or TypeError for a batch that the model can't be scored with."""
    check_images(model, batch, channels=loss_fn is None)
    if loss_fn is None:
        read_batch(model, batch)


def check_images(model: nn.Module, batch: Any, *, channels: bool = True) -> None:
    """Raise ValueError unless the batch's images are finite floats with the model's number of channels.

    channels: False skips the comparison with ``model.config.in_channels`` (a custom ``loss_fn`` may add channels), and
    lets pass images from 0 to 255.
    """
    images = images_of(batch)
    if not images.is_floating_point():
        raise ValueError(f"the loader yields {images.dtype} images; give floats, as in training (usually in [-1, 1])")
    if images.numel() == 0:
        raise ValueError(f"the loader yields an empty batch of shape {tuple(images.shape)}")
    if not bool(images.isfinite().all()):
        bad = (~images.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
        raise ValueError(f"NaN or infinity in the loader's images (positions {bad[:8]} of a batch of {len(images)})")
    wanted = in_channels(model) if channels else None
    if wanted is not None and images.shape[1] != wanted:
        raise ValueError(
            f"the model takes images of {wanted} channels, the loader yields {images.shape[1]} "
            f"(batch of shape {tuple(images.shape)})"
        )
    # Latents and normalised images have negative values too.
    if wanted in (1, 3) and float(images.amin()) >= 0 and float(images.amax()) > BRIGHTEST:
        raise ValueError(
            f"the loader's images go from {float(images.amin()):g} to {float(images.amax()):g}: diffusion models are "
            "trained on [-1, 1], which x / 127.5 - 1 makes of 0 to 255 (a model trained on other numbers: loss_fn)"
        )


def in_channels(model: nn.Module) -> int | None:
    """Channels of the model's images: ``config.in_channels``, else those of its first convolution, else unknown."""
    configured = config_of(model).get("in_channels")
    if isinstance(configured, int):
        # Packed latents (Flux and its kin) are (batch, tokens, channels): the second dim is not the channels.
        return configured if any(isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for m in model.modules()) else None
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))), None)
    return None if first is None else first.in_channels


def count(batch: Any) -> int:
    """Samples in a batch: the length of its images."""
    return len(images_of(batch))


def part(batch: Any, start: int, stop: int | None) -> Any:
    """Some of a batch's samples: everything with one row per sample is cut, everything else stays whole."""
    n = count(batch)
    return _map_leaves(batch, n, lambda x: x[start:stop] if _rows(x) == n else x)


def join(a: Any, b: Any) -> Any:
    """Two batches as one, or None where their structures or images don't fit together."""
    n, m = count(a), count(b)
    left: list[Any] = []
    right: list[Any] = []
    _map_leaves(a, n, lambda x: left.append(x))
    _map_leaves(b, m, lambda x: right.append(x))
    both = [_joined(x, y, n, m) for x, y in zip(left, right)]
    if len(left) != len(right) or any(x is None for x in both):
        return None
    each = iter(both)
    return _map_leaves(a, n, lambda _: next(each))


def _joined(x: Any, y: Any, n: int, m: int) -> Any:
    rows = _rows(x) == n and _rows(y) == m
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        if rows and x.shape[1:] == y.shape[1:] and x.dtype == y.dtype:
            return torch.cat([x, y.to(x.device)])
        return x if not rows and x.shape == y.shape and torch.equal(x, y.to(x.device)) else None
    return [*x, *y] if rows and not isinstance(x, Tensor) and not isinstance(y, Tensor) else None


def repeated(batch: Any, times: int) -> Any:
    """The batch, ``times`` times over: all samples, then all samples again."""
    n = count(batch)

    def repeat(x: Any) -> Any:
        if _rows(x) != n:
            return x
        return x.repeat(times, *[1] * (x.ndim - 1)) if isinstance(x, Tensor) else list(x) * times

    return _map_leaves(batch, n, repeat)


def _rows(leaf: Any) -> int:
    return (len(leaf) if leaf.ndim else -1) if isinstance(leaf, Tensor) else len(leaf)


def _map_leaves(value: Any, n: int, change: Callable[[Any], Any]) -> Any:
    """As ``map_tensors``; a list of ``n`` things that are no tensors (captions) is a leaf with ``n`` rows too."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {k: v if k in SHARED else _map_leaves(v, n, change) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        if len(value) == n and not any(isinstance(v, (Tensor, Mapping, list, tuple)) for v in value):
            return change(value)
        items = [_map_leaves(v, n, change) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
