"""How far a training is: a bar in a terminal, a few lines where there is none."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

# Lines of a whole training where there is no terminal, unless a step takes longer than that.
LINES, SECONDS = 10, 60.0


class Progress:
    """``with Progress("finetuning", steps, done) as progress: progress.step(loss)``.

    total: steps in all. done: those that were there already. show: False shows nothing.
    """

    def __init__(self, what: str, total: int, done: int = 0, *, show: bool = True) -> None:
        self._what, self._total, self._done, self._first = what, total, done, done
        self._show, self._terminal = show, sys.stderr.isatty()
        self._losses: list[float] = []

    def __enter__(self) -> Progress:
        self._start = self._said = time.perf_counter()
        off = not (self._show and self._terminal)
        self._bar: Any = tqdm(desc=self._what, total=self._total, initial=self._done, disable=off)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self, loss: float) -> None:
        """Another step is done, with this loss; what is shown is the mean of the last fifty."""
        self._done += 1
        self._losses = [*self._losses[-49:], loss]
        mean = sum(self._losses) / len(self._losses)
        self._bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
        self._bar.update()
        if self._show and not self._terminal and self._is_due():
            self._said = time.perf_counter()
            so_far = self._said - self._start
            left = so_far / (self._done - self._first) * (self._total - self._done)
            text = f"{self._what}: {self._done} of {self._total} steps, loss {mean:.4f}, {so_far:.0f} s"
            print(f"{text}, about {left:.0f} s left" if left >= 1 else text, file=sys.stderr, flush=True)

    def _is_due(self) -> bool:
        tenth = self._done * LINES // self._total > (self._done - 1) * LINES // self._total
        return tenth or time.perf_counter() - self._said >= SECONDS
