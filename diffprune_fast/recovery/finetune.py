"""Train the pruned model on for a while, with the objective that it was trained with."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from ..objective.isolation import in_mode
from ..objective.loss import LossFunction, Objective, images_of, make_objective
from ..objective.nested import moved
from ..objective.randomness import generator_for, own_randomness, stratified


@dataclass(frozen=True)
class Finetuned:
    """losses: every step's loss, on its own batch. seconds: wall clock."""

    losses: tuple[float, ...]
    seconds: float


def finetune(
    model: nn.Module,
    loader: Iterable[Any],
    scheduler: Any = None,
    *,
    steps: int,
    lr: float = 2e-4,
    warmup: int | None = None,
    schedule: str = "cosine",
    clip: float = 1.0,
    ema: float = 0.9999,
    loss_fn: LossFunction | None = None,
    autocast: torch.dtype | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Finetuned:
    """Finetune ``model`` in place; it ends with the weights' moving average, in the modes that it had.

    loader: as for :func:`diffprune_fast.score`, iterated again and again. scheduler: the one of the training; None is
    ``DDPMScheduler()``. steps: batches to train on. warmup: steps of linear rise to ``lr``; None is a tenth, at most
    500. schedule: what follows, by its name in ``diffusers.optimization``. clip: the gradient's largest norm.
    ema: largest decay of the average; after k steps it is at most (1 + k) / (10 + k). autocast: dtype for the
    forward, such as ``torch.bfloat16``. Parameters without ``requires_grad`` stay as they are; the global random state
    too. Timesteps are stratified within a batch.

    Raises ValueError for an empty loader, no step, or a model without trainable parameters, and FloatingPointError
    for a loss or gradient that is not finite, before it reaches the weights.
    Source: the finetuning of Fang et al., 2023 (Adam, clip 1, EMA 0.9999), with a schedule for short runs.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if steps < 1:
        raise ValueError(f"steps is {steps}: finetuning needs at least one")
    if not parameters:
        raise ValueError(f"no parameter of {type(model).__name__} requires a gradient: there is nothing to finetune")
    objective = make_objective(model, scheduler, loss_fn)
    optimizer = torch.optim.Adam(parameters, lr=lr)
    warmup = min(500, steps // 10) if warmup is None else warmup
    rate = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    average = EMAModel(parameters, decay=ema)
    device, generator = parameters[0].device, generator_for(seed)
    losses: list[float] = []
    start = time.perf_counter()
    try:
        with (
            in_mode(model, training=True),
            own_randomness(seed),
            tqdm(total=steps, desc="finetuning", disable=not progress) as bar,
        ):
            for batch in _endless(loader, steps):
                loss = _step(model, moved(batch, device), objective, generator, autocast)
                norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
                losses.append(_finite(loss, norm, step=len(losses)))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                rate.step()
                average.step(parameters)
                bar.update()
                bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.4f}", refresh=False)
        average.copy_to(parameters)
    finally:
        optimizer.zero_grad(set_to_none=True)
    return Finetuned(tuple(losses), time.perf_counter() - start)


def _step(
    model: nn.Module, batch: Any, objective: Objective, generator: torch.Generator, autocast: torch.dtype | None
) -> Tensor:
    images = images_of(batch)
    t = stratified(np.arange(objective.n_timesteps), len(images), generator).to(images.device)
    with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
        loss = objective.loss(model, batch, t, objective.noise(batch, generator))
    loss.backward()
    return loss.detach()


def _finite(loss: Tensor, norm: Tensor, *, step: int) -> float:
    value = float(loss)
    if not (math.isfinite(value) and math.isfinite(float(norm))):
        raise FloatingPointError(
            f"the loss is {value} and its gradient's norm {float(norm)} at step {step}: look for NaN in the weights or "
            "images, or lower lr"
        )
    return value


def _endless(loader: Iterable[Any], steps: int) -> Iterator[Any]:
    """``steps`` batches of ``loader``, begun again at its end."""
    given = 0
    while given < steps:
        before = given
        for batch in loader:
            yield batch
            given += 1
            if given == steps:
                return
        if given == before:
            raise ValueError(
                "the loader is empty, or can be iterated only once: pass a DataLoader or a list of batches"
            )
