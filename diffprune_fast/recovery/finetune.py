"""Train the pruned model on for a while: with the objective that it was trained with, or towards the dense model."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from ..objective.batches import as_loader
from ..objective.checks import check_batch
from ..objective.forms import as_batch
from ..objective.isolation import in_mode, unwrapped
from ..objective.loss import LossFunction, Objective, images_of, make_objective
from ..objective.nested import moved
from ..objective.randomness import generator_for, own_randomness, stratified
from .distillation import Distillation, StepLoss, find_teacher


@dataclass(frozen=True)
class Finetuned:
    """losses: every step's loss, on its own batch. seconds: wall clock."""

    losses: tuple[float, ...]
    seconds: float


# Adam's largest rate. Towards the noise: the authors'. Towards a teacher: a small DiT at half its MACs, compensated,
# ended 200 steps at 5e-4 with a held-out loss of .0757, at 1e-3 with .0765 (before: .0775).
LEARNING_RATE, LEARNING_RATE_WITH_TEACHER = 2e-4, 5e-4


def finetune(
    model: nn.Module,
    loader: Iterable[Any],
    scheduler: Any = None,
    *,
    steps: int,
    lr: float | None = None,
    teacher: nn.Module | str | os.PathLike[str] | None = None,
    teacher_share: float = 1.0,
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

    Parameters without ``requires_grad`` stay as they are; the global random state too. Timesteps are stratified within
    a batch.

    Args:
        model: a denoiser or an autoencoder, pruned or not.
        loader: as for :func:`diffprune_fast.score`, iterated again and again.
        scheduler: the one of the training; None is ``DDPMScheduler()``.
        steps: batches to train on.
        lr: the learning rate of Adam after the warmup; None is 2e-4, with a teacher 5e-4.
        warmup: steps of linear rise to ``lr``; None is a tenth, at most 500.
        schedule: what follows, by its name in ``diffusers.optimization``.
        clip: the gradient's largest norm.
        ema: largest decay of the average; after k steps it is at most (1 + k) / (10 + k).
        loss_fn: ``(model, batch, t, noise) -> (batch,) or scalar`` in place of the scheduler's objective.
        autocast: dtype for the forward, such as ``torch.bfloat16``.
        teacher: the dense model, such as ``score_and_prune(…, inplace=False)`` leaves it, or its folder. The loss is
            then the mean squared distance of the model's answers to the teacher's at the same noisy images, timesteps
            and conditioning. Both run in evaluation mode: no dropout, no dropped labels. The teacher is left as it is,
            on whatever device it is.
        teacher_share: of that distance in the loss; 0.7 adds 0.3 of the objective's own loss.
        seed: of timesteps and noise.
        progress: False hides the bar.

    Returns:
        Every step's loss, and the seconds.

    Raises:
        ValueError: an empty loader, a setting that can't train, a model without trainable parameters, or a teacher that
        doesn't fit.
        FloatingPointError: a loss or gradient is not finite; it doesn't reach the weights.

    Example:
        >>> from diffusers import UNet2DModel
        >>> unet = UNet2DModel(8, block_out_channels=(8,), down_block_types=("DownBlock2D",),
        ...                    up_block_types=("UpBlock2D",), norm_num_groups=4)
        >>> done = finetune(unet, [torch.rand(8, 3, 8, 8) * 2 - 1], steps=3, progress=False)
        >>> len(done.losses)
        3

    Source: the finetuning of Fang et al., 2023 (Adam, clip 1, EMA 0.9999), with a schedule for short runs; Hinton et
    al., Distilling the Knowledge in a Neural Network (arXiv 1503.02531).
    """
    lr = (LEARNING_RATE if teacher is None else LEARNING_RATE_WITH_TEACHER) if lr is None else lr
    warmup = min(500, steps // 10) if warmup is None else warmup
    _check_settings(steps, lr, warmup, clip, ema, teacher_share, teacher is not None)
    parameters = _trainable(model)
    objective = make_objective(model, scheduler, loss_fn)
    loss: StepLoss = objective.loss
    optimizer = torch.optim.Adam(parameters, lr=lr)
    rate = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    average = EMAModel(parameters, decay=ema)
    start = time.perf_counter()
    with ExitStack() as stack:
        stack.callback(optimizer.zero_grad, set_to_none=True)
        if teacher is not None:
            teacher = stack.enter_context(in_mode(find_teacher(teacher, model), training=False))
            loss = Distillation(teacher, objective, teacher_share, autocast)
        stack.enter_context(in_mode(model, training=teacher is None))
        stack.enter_context(own_randomness(seed))
        bar = stack.enter_context(
            tqdm(_endless(Checked(model, loader, loss_fn), steps), "finetuning", steps, disable=not progress)
        )
        gradients = _gradients(model, bar, loss, objective, generator_for(seed), autocast)
        losses = _descend(parameters, gradients, optimizer, rate, average, clip, bar)
    return Finetuned(losses, time.perf_counter() - start)


def _descend(
    parameters: list[nn.Parameter],
    gradients: Iterator[Tensor],
    optimizer: torch.optim.Optimizer,
    rate: Any,
    average: EMAModel,
    clip: float,
    bar: tqdm[Any],
) -> tuple[float, ...]:
    """Follow the gradients, one step for each, and end at the average. gradients: yields the loss of each."""
    losses: list[float] = []
    for loss in gradients:
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        losses.append(_finite(loss, norm, step=len(losses)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rate.step()
        average.step(parameters)
        bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.4f}", refresh=False)
    average.copy_to(parameters)
    return tuple(losses)


def _check_settings(
    steps: int, lr: float, warmup: int, clip: float, ema: float, teacher_share: float, has_teacher: bool
) -> None:
    """Raises ValueError for numbers that train nothing, or away from the minimum."""
    if steps < 1:
        raise ValueError(f"steps is {steps}: finetuning needs at least one")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr is {lr}: it must be above 0, such as {LEARNING_RATE}")
    if warmup < 0:
        raise ValueError(f"warmup is {warmup}: it is a number of steps, 0 for none")
    if not clip > 0:
        raise ValueError(f"clip is {clip}: it must be above 0 (math.inf doesn't clip)")
    if not 0 <= ema < 1:
        raise ValueError(f"ema is {ema}: it must be at least 0 (no average) and below 1")
    if not 0 < teacher_share <= 1:
        raise ValueError(f"teacher_share is {teacher_share}: it must be above 0 and at most 1")
    if teacher_share < 1 and not has_teacher:
        raise ValueError(f"teacher_share is {teacher_share}, but there is no teacher: give teacher=, the dense model")


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(f"no parameter of {type(model).__name__} requires a gradient: there is nothing to finetune")
    return parameters


def _gradients(
    model: nn.Module,
    batches: Iterable[Any],
    loss: StepLoss,
    objective: Objective,
    generator: torch.Generator,
    autocast: torch.dtype | None,
) -> Iterator[Tensor]:
    """The loss of every batch, when its gradients are there."""
    device = next(model.parameters()).device
    for batch in (moved(batch, device) for batch in batches):
        images = images_of(batch)
        t = stratified(np.arange(objective.n_timesteps), len(images), generator).to(device)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            value = loss(model, batch, t, objective.noise(batch, generator))
        value.backward()
        yield value.detach()


def _finite(loss: Tensor, norm: Tensor, *, step: int) -> float:
    value = float(loss)
    if not (math.isfinite(value) and math.isfinite(float(norm))):
        raise FloatingPointError(
            f"the loss is {value} and its gradient's norm {float(norm)} at step {step}: look for NaN in the weights or "
            "images, or lower lr"
        )
    return value


class Checked:
    """A loader whose batches come through the door that scoring has."""

    def __init__(self, model: nn.Module, loader: Any, loss_fn: LossFunction | None) -> None:
        self.model, self.loader, self.loss_fn = unwrapped(model), as_loader(loader), loss_fn

    def __iter__(self) -> Iterator[Any]:
        for batch in map(as_batch, self.loader):
            check_batch(self.model, batch, self.loss_fn)
            yield batch


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
