"""Endless micro-batches from whatever the user's loader is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .conditioning import SHARED
from .forms import as_batch
from .loss import images_of
from .nested import tensors_in
from .randomness import Stream
from .ranks import compare_batch

# Samples of a batch that is taken of one big tensor.
ROWS = 64

# What a loader that can be walked only once may leave in memory, to be seen again.
CACHE_BYTES = 1 << 30


EMPTY = "the loader is empty: scoring needs at least one batch of images"


class Batches:
    """Batches of a loader, drawn for ever; its first batch is there, checked, before anything else happens.

    loader: any iterable of batches. A loader that is its own iterator (a generator) is walked once; what it yielded is
    kept (up to ``CACHE_BYTES``) and seen again. check: called with every batch; raises for a bad one. seed: of what the
    loader draws, whatever is drawn in between; None leaves it to the global generators.

    Raises ValueError for an empty loader, TypeError for something that isn't iterable.
    """

    def __init__(self, loader: Iterable[Any], check: Callable[[Any], None], seed: int | None = None) -> None:
        self._loader, self._check = replayed(as_loader(loader)), check
        self._numbers = nullcontext() if seed is None else Stream(seed)
        with self._numbers:
            self._iterator: Iterator[Any] = iter(self._loader)
        self._left: Any = None
        self._passed_over: list[int] = []
        self.first = self._draw(empty=EMPTY)
        compare_batch(self.first)
        self._pending: list[Any] = [self.first]

    def take(self, size: int) -> Any:
        """The next ``size`` samples; fewer where batches can't be joined (images of another size, no tensors)."""
        while self._passed_over:
            self._take(self._passed_over.pop(0))
        return self._take(size)

    def pass_over(self, sizes: Iterable[int]) -> None:
        """Leave out what ``take`` would give for these sizes, one after the other; read once something is taken."""
        self._passed_over += sizes

    def _take(self, size: int) -> Any:
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
                with self._numbers:
                    batch = as_batch(next(self._iterator))
            except StopIteration:
                if attempt or empty:
                    break
                with self._numbers:
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
    """The loader; one big tensor or array is cut. Raises TypeError for something that isn't an iterable of batches."""
    if isinstance(loader, np.ndarray):
        loader = as_batch(loader)
    if isinstance(loader, Tensor):
        return list(loader.split(ROWS)) if loader.ndim else [loader]
    if not isinstance(loader, Iterable) or isinstance(loader, (str, bytes, Mapping)):
        raise TypeError(f"loader must be an iterable of batches, such as a DataLoader; it is {type(loader).__name__}")
    return loader


def peeked(loader: Any) -> tuple[Any, Iterable[Any]]:
    """The first batch, and the loader as if nobody had looked. Raises ValueError for an empty loader."""
    loader = as_loader(loader)
    iterator = iter(loader)
    for first in iterator:
        return as_batch(first), itertools.chain([first], iterator) if iterator is loader else loader
    raise ValueError(EMPTY)


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
