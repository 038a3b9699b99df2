"""A loss that can be drawn from: fresh images, noise and timesteps for every micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .batches import Batches, count
from .loss import Objective
from .nested import moved
from .randomness import NOISE, TIMESTEPS, generator_for, seed_at, seed_globally, stratified
from .ranks import rank_and_count, reduced, summed_over_ranks
from .shards import BorrowedShards


def precision(device: torch.device, autocast: torch.dtype | None) -> AbstractContextManager[Any]:
    """A forward's dtype; None for the weights'."""
    return nullcontext() if autocast is None else torch.autocast(device.type, dtype=autocast)


def sum_dtype(device: torch.device) -> torch.dtype:
    """What is summed in: double precision where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(kw_only=True)
class LossRun:
    """A model, its training loss, and where its images come from.

    device: the model's. seed: of noise and timesteps. autocast: the forward's dtype, None for the weights'. progress:
    whether bars are shown. shards: of a model that is spread over ranks.
    """

    model: nn.Module
    objective: Objective
    batches: Batches
    device: torch.device
    seed: int
    autocast: torch.dtype | None = None
    progress: bool = True
    shards: BorrowedShards | None = None
    _failed: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._failed = torch.zeros(self.objective.n_timesteps, dtype=torch.int32, device=self.device)

    @property
    def sum_dtype(self) -> torch.dtype:
        return sum_dtype(self.device)

    @property
    def sharing(self) -> tuple[int, int]:
        """This process's place among those that share the micro-batches, and how many they are.

        The ranks of a sharded model all walk all of them: none could walk one alone.
        """
        return rank_and_count() if self.shards is None else (0, 1)

    def of_all_batches(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over the ranks that share the micro-batches; a copy."""
        return summed_over_ranks(values) if self.shards is None else values.clone()

    def of_all_shards(self, values: Tensor) -> Tensor:
        """``values`` in place, added up over the ranks that a sharded model is spread over."""
        return values if self.shards is None else reduced(values)

    def backward(self, loss: Tensor, inputs: Sequence[nn.Parameter] | None = None) -> None:
        """Gradients of ``inputs``, or of all that has any, in ``.grad`` of the stand-ins."""
        if self.shards is None:
            loss.backward(inputs=inputs)
        else:
            self.shards.backward(loss, inputs)

    def precision(self) -> AbstractContextManager[Any]:
        return precision(self.device, self.autocast)

    def losses(self, batch: Any, t: Tensor, noise: Tensor) -> Tensor:
        """``(batch,)`` losses, or a scalar where a ``loss_fn`` has no more. The host doesn't wait for the device.

        A NaN or infinite one is remembered until :meth:`check_losses`. Raises ValueError where nothing can be
        differentiated.
        """
        with self.precision():
            losses = self.objective.loss(self.model, batch, t, noise, reduction="none")
        if torch.is_grad_enabled() and not losses.requires_grad:
            raise ValueError("the loss doesn't depend on the model's parameters: there is no gradient to score with")
        bad = ~torch.isfinite(losses.detach())
        self._failed.index_add_(0, t, (bad if bad.shape == t.shape else bad.any().expand(len(t))).int())
        return losses

    def mean_loss(self, batch: Any, t: Tensor, noise: Tensor, place: tuple[int, ...] | None = None) -> Tensor:
        """place: in the seed's tree, from where the loss itself may draw; so that it draws the same on any number of
        ranks, and after a break."""
        if place is not None:
            seed_globally(seed_at(self.seed, *place))
        self.of_all_shards(torch.zeros((), device=self.device))  # FSDP2 waits without looking for news
        return self.losses(batch, t, noise).mean()

    def check_losses(self) -> None:
        """Raise FloatingPointError, naming the timesteps, if a loss since the start was NaN or infinite."""
        steps = self._failed.nonzero().flatten().tolist()
        if steps:
            raise FloatingPointError(f"NaN or infinite loss at timesteps {steps[:8]}")

    def draw(self, k: int, size: int, allowed: np.ndarray) -> tuple[Any, Tensor, Tensor]:
        """Micro-batch ``k``: images, timesteps and noise, the same on any number of ranks."""
        batch = self.batches.take(size)
        noise = self.objective.noise(batch, generator_for(self.seed, NOISE, k))
        t = stratified(allowed, count(batch), generator_for(self.seed, TIMESTEPS, k))
        return moved((batch, t, noise), self.device)  # last, so that nothing is waited for in between
