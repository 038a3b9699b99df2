"""Whether a training helped: what it minimises, before and after, on the same samples at the same noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from ..objective.batches import Batches, count, part
from ..objective.isolation import in_mode
from ..objective.loss import Objective
from ..objective.loss_run import precision, sum_dtype
from ..objective.nested import moved
from ..objective.randomness import generator_for, own_randomness, stratified
from ..objective.ranks import rank_and_count, reduced
from ..objective.shards import local
from .distillation import StepLoss

# Samples of both looks. The noise is the same in both, so that few are enough to tell which is lower.
SAMPLES = 128

# The place in the seed's tree, beside those of scoring, compensation and dropout.
PLACE = 32


class Guard:
    """The loss on some samples of the loader, which a model can be asked for again; and the weights that it had."""

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        check: Callable[[Any], None],
        objective: Objective,
        loss: StepLoss,
        autocast: torch.dtype | None,
        seed: int,
        *,
        differentiates: bool,
    ) -> None:
        """differentiates: the loss may ask for gradients itself. Raises as a loader's first batch does."""
        self._model, self._loss, self._autocast, self._seed = model, loss, autocast, seed
        self._objective, self._differentiates = objective, differentiates
        with own_randomness(seed, loader):
            batches = Batches(loader, check)
            self._batch = batches.take(max(SAMPLES, rank_and_count()[1]))
        self._size = min(count(batches.first), count(self._batch))
        self._was = {name: local(x.detach()).cpu().clone() for name, x in model.state_dict().items()}

    def loss(self) -> float:
        """The mean over the samples, which the ranks share."""
        n, device = count(self._batch), next(self._model.parameters()).device
        noise = self._objective.noise(self._batch, generator_for(self._seed, PLACE, 0))
        t = stratified(np.arange(self._objective.n_timesteps), n, generator_for(self._seed, PLACE, 1))
        rank, ranks = rank_and_count()
        sums = torch.zeros(2, dtype=sum_dtype(device), device=device)
        with in_mode(self._model, training=False), torch.set_grad_enabled(self._differentiates):
            for start, stop in self._portions(n * rank // ranks, n * (rank + 1) // ranks, n // ranks):
                batch = moved(part(self._batch, start, stop), device)
                with own_randomness(self._seed), precision(device, self._autocast):
                    value = self._loss(self._model, batch, t[start:stop].to(device), noise[start:stop].to(device))
                sums += torch.stack([value.detach().to(sums).mean() * (stop - start), sums.new_tensor(stop - start)])
        total, samples = reduced(sums).tolist()
        return total / samples

    def put_back(self) -> None:
        """Give the model the weights that it had."""
        for name, x in self._model.state_dict().items():
            local(x.detach()).copy_(self._was[name])

    def _portions(self, start: int, stop: int, least: int) -> Iterator[tuple[int, int]]:
        """As many for every rank, which has ``least`` samples or one more: sharded models are called together."""
        n = max(1, -(-least // self._size))
        for i in range(n):
            yield start + (stop - start) * i // n, start + (stop - start) * (i + 1) // n


def can_look_twice(loader: Any) -> bool:
    """Whether samples of a loader can be taken without lacking in the training."""
    return not isinstance(loader, Iterator)
