"""The reference's loop: one batch, one noise, t = 0, 1, 2, … until the loss is small; and its quadratic short cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..objective.batches import count, repeated
from ..objective.loss import images_of
from ..objective.nested import moved
from ..objective.randomness import NOISE, generator_for
from ..progress import bar
from .criteria import Variant, counted_members, divided_by_group_mean
from .estimators import Work, gathered_scores
from .scores import LossCurve
from .tables import unit_table
from .timesteps import Cell

# Timesteps share a pass until it has this many samples: a small batch alone leaves the machine idle.
SAMPLES_PER_PASS = 64


@dataclass
class LossRecord:
    """What the loop saw. samples: passes forward and backward."""

    timesteps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    samples: int = 0

    def curve(self, threshold: float) -> LossCurve:
        return LossCurve(np.array(self.timesteps, np.int64), np.array(self.losses), threshold)


class OneBatch:
    """The loss of one fixed batch with one fixed noise, at several timesteps in one pass."""

    def __init__(self, work: Work, loss: str, samples_per_pass: int) -> None:
        self._work = work
        self._batch = moved(work.batches.first, work.device)
        self._noise = work.objective.noise(self._batch, generator_for(work.seed, NOISE, 0))
        self.size = count(self._batch)
        pixels = images_of(self._batch)[0].numel()
        self._factor = float(pixels) if loss == "pixel_sum" and work.objective.loss_fn is None else 1.0
        self._most = max(1, samples_per_pass // self.size)

    def passes(self, cells: Sequence[Cell]) -> Iterator[Sequence[Cell]]:
        """The cells in portions that fit into a pass; the first alone, to see what kind of loss it is."""
        start = 0
        while start < len(cells):
            stop = start + (1 if start == 0 else self._most)
            yield cells[start:stop]
            start = stop

    def losses_at(self, cells: Sequence[Cell]) -> Tensor:
        """``(len(cells),)``: the mean loss at each cell's timestep."""
        k = len(cells)
        t = torch.tensor([c.timestep for c in cells], device=self._work.device).repeat_interleave(self.size)
        batch = self._batch if k == 1 else repeated(self._batch, k)
        noise = self._noise if k == 1 else self._noise.repeat(k, *[1] * (self._noise.ndim - 1))
        losses = self._work.losses(batch, t, noise)
        self._work.check_losses()  # the loop looks at every loss: it waits for the device anyway
        if losses.ndim == 0:
            self._most = 1  # a scalar loss can't be told apart by timestep: one timestep per pass
            return losses.view(1) * self._factor
        return losses.view(k, -1).mean(1) * self._factor


def reference_scores(
    work: Work,
    cells: Sequence[Cell],
    *,
    variant: Variant,
    threshold: float | None,
    samples_per_pass: int = SAMPLES_PER_PASS,
) -> tuple[np.ndarray, LossRecord]:
    """Scores from gradients summed over the timesteps until ``L_t < threshold * running max``; None: over all.

    Every cell counts with its width. samples_per_pass: several timesteps share a pass up to this many samples.
    """
    for p in work.parameters.values():
        p.grad = None
    with bar(desc="scoring", show=work.progress, total=len(cells), unit="timestep") as shown:
        one = OneBatch(work, variant.loss, samples_per_pass)
        if variant.stop == "set" and threshold is not None:
            record = _over_the_set(one, cells, threshold, shown.update)
        else:
            record = _until_small(one, cells, threshold, variant.stop, shown.update)
        shown.total = shown.n
    plain, norms = counted_members(work.plan, work.model, variant)
    values = gathered_scores(work, unit_table(work.plan, members=plain), variant.element)
    if norms and variant.norms is not None:
        values += gathered_scores(work, unit_table(work.plan, members=norms), variant.norms)
    found = values.double().cpu().numpy()
    return divided_by_group_mean(work.plan, found) if variant.normalise else found, record


def _until_small(one: OneBatch, cells: Sequence[Cell], threshold: float | None, stop: str, tick: object) -> LossRecord:
    record, largest = LossRecord(), -np.inf
    for portion in one.passes(cells):
        losses = one.losses_at(portion)
        weights = [0.0] * len(portion)
        ended = False
        for i, (cell, loss) in enumerate(zip(portion, losses.tolist())):
            largest = max(largest, loss)
            record.timesteps.append(cell.timestep)
            record.losses.append(loss)
            ended = threshold is not None and loss < threshold * largest
            if not ended or stop == "after":
                weights[i] = float(cell.width)
                record.samples += one.size
            if ended:
                break
        if any(weights):
            (losses * torch.tensor(weights, dtype=losses.dtype, device=losses.device)).sum().backward()
        tick(len(portion))  # type: ignore[operator]
        if ended:
            break
    return record


def _over_the_set(one: OneBatch, cells: Sequence[Cell], threshold: float, tick: object) -> LossRecord:
    """All timesteps with ``L_t > T * L_max``: the losses first, forward only, then the gradients where they count."""
    record = LossRecord()
    for portion in one.passes(cells):
        with torch.no_grad():
            record.losses += one.losses_at(portion).tolist()
        record.timesteps += [c.timestep for c in portion]
    largest = max(record.losses)
    chosen = [c for c, loss in zip(cells, record.losses) if loss > threshold * largest]
    for portion in one.passes(chosen):
        losses = one.losses_at(portion)
        widths = torch.tensor([float(c.width) for c in portion], dtype=losses.dtype, device=losses.device)
        (losses * widths).sum().backward()
        record.samples += one.size * len(portion)
        tick(len(portion))  # type: ignore[operator]
    return record
