"""Bytes that a forward needs at once, as a function of how many units every group keeps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ..architectures.inputs import Call, ExampleInputs, calls_of
from ..compensation.live_bytes import live_bytes
from ..objective.isolation import in_mode
from ..plan.lattice import Lattice
from ..plan.plan import Plan
from .clock import real, run
from .levels import BytesOfLevels
from .recording import Recorded, record
from .widths import Bytes


class Memory:
    """Peak bytes of a forward, with any numbers of units kept: parameters and buffers, and the most that activations
    take together while it runs, those that an operation reads and gives among them.

    Not counted: the inputs, and what kernels take for themselves while they run (convolutions by FFT or im2col, an
    attention without a fused kernel). Call it with kept counts, ``(n_groups,)`` or ``(n, n_groups)``.
    """

    kind = "memory"

    def __init__(self, found: Recorded, calls: Sequence[Call]) -> None:
        self.calls = calls
        self.widths = found.widths
        self._parameters, self._made = Bytes(found.parameters), Bytes(found.made)
        live = np.zeros((len(found.live), len(found.made)))
        for row, alive in zip(live, found.live):
            row[list(alive)] = 1.0
        self._live = _largest(self._made.added(live))

    def __call__(self, counts: np.ndarray) -> Any:
        sizes = self.widths.at(np.atleast_2d(counts))
        activations = self._made.at(sizes) @ self._live.T
        found = self._parameters.at(sizes).sum(axis=1) + activations.max(axis=1, initial=0.0)
        return found if counts.ndim > 1 else found[0]

    def in_levels(self, lattice: Lattice) -> BytesOfLevels:
        """The same by kept levels, for the allocation."""
        return BytesOfLevels(self.widths, lattice, self._parameters, self._made, self._live)

    def words(self, n: float) -> str:
        return f"{n / 1e6:.4g} MB"

    def measured(self, models: Sequence[nn.Module]) -> list[float]:
        """Peak bytes of a real forward of each."""
        return [peak_bytes(model, self.calls) for model in models]


def _largest(live: np.ndarray) -> np.ndarray:
    """The rows that may be the peak: none that another one is nowhere below."""
    rows = np.unique(live, axis=0)
    return rows[[not any((row <= other).all() and (row < other).any() for other in rows) for row in rows]]


def count_memory(model: nn.Module, plan: Plan, example_inputs: ExampleInputs | None = None) -> Memory:
    """Count the memory that a forward of the example inputs takes, at their batch size, for ``memory=``.

    The forward runs once on ``meta``: which activations are alive at the same time is seen there, nothing is measured.

    Args:
        model, plan: a model and what :func:`trace` made of it.
        example_inputs: as for :func:`trace`.

    Returns:
        Bytes as a function of kept counts, for ``select(..., memory=0.6, costs={"memory": ...})``.

    Raises:
        TraceError, ValueError: as :func:`trace`.

    Example:
        >>> from diffprune_fast import trace
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> plan = trace(model, (torch.zeros(8, 4),))
        >>> memory = count_memory(model, plan, (torch.zeros(8, 4),))
        >>> float(memory(plan.counts())) == 4 * plan.params() + 4 * 8 * (16 + 16)  # while the ReLU runs
        True
    """
    return Memory(record(model, plan, example_inputs), calls_of(model, example_inputs))


@torch.inference_mode()
def peak_bytes(model: nn.Module, calls: Sequence[Call]) -> float:
    """Parameters, buffers and the most that a real forward takes beside them.

    On CUDA that is what the allocator gave, elsewhere the tensors that were alive at a time.
    """
    held = {t.untyped_storage()._cdata: t.untyped_storage() for t in (*model.parameters(), *model.buffers())}
    device = next(iter(held.values())).device if held else torch.device("cpu")
    inputs = [(method, *real((args, kwargs), device)) for method, args, kwargs in calls]
    with in_mode(model, training=False):
        run(model, inputs)  # what is cached by the first call doesn't count
        taken = (_peak_on_cuda if device.type == "cuda" else live_bytes)(partial(run, model, inputs))
    return sum(s.nbytes() for s in held.values()) + taken


def _peak_on_cuda(call: Any) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
