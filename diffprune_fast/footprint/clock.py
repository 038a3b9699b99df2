"""How long operations and models take, on a machine that others may use as well."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..architectures.inputs import Call
from ..objective.isolation import in_mode
from .recording import Operation
from .replay import ready

# A timing is of calls that together take so long: below, the clock and the interpreter count.
_LAP = 1.5e-3
_LAPS = 5
# In a model every call has other weights and activations than the one before: so many bytes, or sets of tensors, are
# gone through in turn. (On the digits model, without, what half the MACs save came out a third too low.)
_CACHES, _SETS = 16 << 20, 32
# Rounds of interleaved models: at least, at most, and the seconds after which they end in between.
_ROUNDS = (7, 101)
_ROUNDS_SECONDS = 4.0


class Clock(Protocol):
    """What times are measured with; a test gives one that calculates them."""

    name: str

    def operation(self, operation: Operation) -> float:
        """Seconds of one operation of given sizes. Raises RuntimeError, ValueError where it can't be called so."""
        ...

    def model(self, model: nn.Module, calls: Sequence[Call]) -> float:
        """Seconds of a forward of one, to be compared with those of operations."""
        ...

    def models(self, models: Sequence[nn.Module], calls: Sequence[Call]) -> list[float]:
        """Seconds of a forward of each: their ratios are those that count."""
        ...


class DeviceClock:
    """Wall-clock time on a device (of one thread on the CPU: its CPU time), in eager mode, with the threads of now.

    Operations, and a model alone: the least of several laps. Models: forwards in turn; the first one's median, and of
    the others the median ratio to the first one of the same round.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.name = device_name(device)
        # One thread's own time is what it would take alone, whatever else runs on the machine.
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        self._now = time.thread_time if alone else time.perf_counter

    @torch.inference_mode()
    def operation(self, operation: Operation) -> float:
        held = sum(s.itemsize * math.prod(s.sizes) for s in operation.shapes)
        calls = [ready(operation, self.device) for _ in range(max(1, min(_SETS, _CACHES // max(held, 1))))]
        calls[0]()
        first = self._lap(calls[:1])
        calls = calls * max(1, round(_LAP / max(first, 1e-7) / len(calls)))
        laps = _LAPS if first < 0.05 else 2
        return min(self._lap(calls) / len(calls) for _ in range(laps))

    def model(self, model: nn.Module, calls: Sequence[Call]) -> float:
        return min(seconds for (seconds,) in self._rounds([model], calls))

    def models(self, models: Sequence[nn.Module], calls: Sequence[Call]) -> list[float]:
        rounds = self._rounds(models, calls)
        first = statistics.median(r[0] for r in rounds)
        return [first, *(first * statistics.median(r[i] / r[0] for r in rounds) for i in range(1, len(models)))]

    @torch.inference_mode()
    def _rounds(self, models: Sequence[nn.Module], calls: Sequence[Call]) -> list[list[float]]:
        inputs = [(method, *real((args, kwargs), self.device)) for method, args, kwargs in calls]
        rounds: list[list[float]] = []
        with ExitStack() as stack:
            for model in models:
                stack.enter_context(in_mode(model, training=False))
                for _ in range(2):
                    self._lap([partial(run, model, inputs)])
            began = time.perf_counter()
            while len(rounds) < _ROUNDS[0] or (
                len(rounds) < _ROUNDS[1] and time.perf_counter() - began < _ROUNDS_SECONDS
            ):
                rounds.append([self._lap([partial(run, model, inputs)]) for model in models])
        return rounds

    def _lap(self, calls: Sequence[Callable[[], Any]]) -> float:
        self._wait()
        start = self._now()
        for call in calls:
            call()
        self._wait()
        return self._now() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def run(model: nn.Module, calls: Sequence[Call]) -> None:
    for method, args, kwargs in calls:
        (model if method == "forward" else getattr(model, method))(*args, **kwargs)


def real(tree: Any, device: torch.device) -> Any:
    """Inputs on a device: noise in place of those that have no values."""
    generator = torch.Generator().manual_seed(0)

    def moved(t: Tensor) -> Tensor:
        return (torch.randn(t.shape, generator=generator, dtype=t.dtype) if t.is_meta else t).to(device)

    return tree_map_only(Tensor, moved, tree)


def device_name(device: torch.device) -> str:
    """A device in words: times that were measured on one don't hold on another."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    n = torch.get_num_threads()
    return f"{_processor()}, {n} thread{'s' if n > 1 else ''}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            return next(line.partition(":")[2].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
