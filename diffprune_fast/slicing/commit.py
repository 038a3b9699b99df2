"""The commit: what was made ready now happens, from the first call to the last, whatever comes in between."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, compress
from operator import methodcaller
from typing import Any, TypeVar

import torch

from ..ops.slice_channels import Step
from ..pruned.record import Record, attach_record
from ..result import PruneResult, noted

logger = logging.getLogger("diffprune_fast")

T = TypeVar("T")

# A call that fails twice is left out: it was prepared, so only the last bytes of memory can be what it lacked.
_ATTEMPTS = 2


def carry_out(steps: Sequence[Step], outcome: T) -> T:
    """Make every call once, in order, and return ``outcome``: after the first there is no way but to the end.

    Python's signal handlers wait until it is over. The calls run in one loop of C, where they are C themselves, so that
    no line of Python stands between them; one that raises is made again. What isn't an ordinary error (an interrupt, or
    what a signal handler raised) is raised at the end, with ``outcome`` as its ``result``. Raises what the first call
    raises, which has then done nothing.
    """
    begun, done = bytearray(len(steps)), bytearray(len(steps))
    marked = [(partial(begun.__setitem__, i, 1), step, partial(done.__setitem__, i, 1)) for i, step in enumerate(steps)]
    signals, failed = _Signals(), 0
    interrupt: BaseException | None = None
    try:
        signals.hold()
    except BaseException:
        signals.let_go()
        raise
    while True:
        try:
            left = chain.from_iterable(compress(marked, [not d for d in done]))
            deque(map(methodcaller("__call__"), left), maxlen=0)
            signals.let_go()
            interrupt = signals.deliver() or interrupt
            if interrupt is None:
                return outcome
            break
        except BaseException as error:
            if 1 not in done:
                signals.let_go()
                raise
            interrupt = interrupt if isinstance(error, Exception) else error
            at = done.find(0)
            failed += at >= 0 and begun[at]
            if failed >= _ATTEMPTS:
                logger.warning("left out while a model was changed, as it failed twice: %s (%r)", steps[at], error)
                done[at], failed = 1, 0
    assert interrupt is not None
    interrupt.result = outcome  # type: ignore[attr-defined]
    raise interrupt


def undo(steps: Sequence[Step]) -> None:
    """Carry out calls that put things back, for an ``except`` clause: what came up there goes on to the caller."""
    carry_out(steps, None)


def gradients_as_now() -> list[Step]:
    """What puts back whether gradients are recorded: an interrupt in ``torch.no_grad`` can leave that switched off."""
    return [partial(torch.set_grad_enabled, torch.is_grad_enabled())]


class _Signals:
    """Signals that have handlers in Python, which run in the main thread between any two lines."""

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._came: dict[int, bool] = {}

    def hold(self) -> None:
        """From now on they are noted only; other threads than the main one never run handlers."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            if callable(handler):
                self._handlers[number] = handler
                self._came[number] = False
                signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self._came[number] = True

    def let_go(self) -> None:
        """The former handlers are back; may be called again."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def deliver(self) -> BaseException | None:
        """Run the handlers of what came; the first exception that one of them raised."""
        raised = None
        for number in [n for n, came in self._came.items() if came]:
            self._came[number] = False
            try:
                signal.raise_signal(number)
            except BaseException as error:
                raised = raised or error
        return raised


@dataclass(frozen=True)
class Change:
    """A pruning that is ready: what it will give, and the calls that lead there.

    result: says what the model will be. steps: the calls. record: of the model as it will be, without how it came to
    be, which is the result's.
    """

    result: PruneResult
    steps: Sequence[Step]
    record: Record = field(default_factory=Record)

    def and_then(self, steps: Sequence[Step], **more: Any) -> Change:
        """The same with further calls, and ``more`` in the result's fields."""
        return replace(self, result=replace(self.result, **more), steps=[*self.steps, *steps])

    def made(self, after: Sequence[Step] = ()) -> PruneResult:
        """Carry it out, ``after`` last; the model carries a record that says the same as the result."""
        record = replace(self.record, about=noted(self.result))
        attach = partial(attach_record, self.result.model, record)
        seconds = self.result.seconds  # the record has the same dictionary
        clock = partial(_add_time, seconds, seconds.get("slice", 0.0), time.perf_counter())
        return carry_out([*self.steps, attach, clock, *after], self.result)


def _add_time(seconds: dict[str, float], before: float, began: float) -> None:
    seconds["slice"] = before + time.perf_counter() - began
