"""Where in a loader a training is: batches for ever, from any place in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ..objective.randomness import Stream, own_states, set_own_states


class Position:
    """Batches of ``loader``, begun again at its end, and where in them one is.

    What the loader draws comes from numbers of its own: neither the model's dropout nor another process changes the
    order of the images. read: what makes a batch of what the loader yields, or refuses it.
    """

    def __init__(self, loader: Iterable[Any], seed: int, read: Callable[[Any], Any] = lambda batch: batch) -> None:
        self._loader, self._stream, self._read = loader, Stream(seed), read
        self._begin()

    def __next__(self) -> Any:
        """The next batch. Raises ValueError for a loader without any, or that can be walked only once."""
        with self._stream:
            try:
                batch = next(self._batches)
            except StopIteration:
                batch = self._again()
        self._given += 1
        return self._read(batch)

    def state(self) -> dict[str, Any]:
        """The randomness that this pass began with, and how many batches it gave since; plain values and tensors."""
        return {"began": self._began, "own": self._own, "given": self._given}

    def go_to(self, state: Mapping[str, Any]) -> None:
        """Go to where :meth:`state` was asked for: the pass is begun as it was, and its batches are read again."""
        self._stream.states = state["began"]
        set_own_states(self._loader, state["own"])
        self._begin()
        for _ in range(state["given"]):
            next(self)

    def _begin(self) -> None:
        self._began, self._own, self._given = self._stream.states, own_states(self._loader), 0
        with self._stream:
            self._batches: Iterator[Any] = iter(self._loader)

    def _again(self) -> Any:
        """The first batch of another pass; called where the stream is in use."""
        was_empty = self._given == 0
        self._stream.__exit__()
        self._begin()
        self._stream.__enter__()
        for batch in self._batches:
            return batch
        raise ValueError(
            "the loader is empty, or can be iterated only once: pass a DataLoader or a list of batches"
            if was_empty
            else "the loader can be iterated only once: pass a DataLoader or a list of batches"
        )
