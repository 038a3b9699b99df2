"""What a step minimises, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..choices import RecoveryLoss, check_choice
from ..objective.loss import Objective
from .distillation import Distillation, StepLoss
from .features import FeatureDistillation, shared_layers
from .second_order import SecondOrder

# Of the teacher's answers in the mix.
MIX = 0.7


def step_loss_of(
    loss: RecoveryLoss | StepLoss | None,
    model: nn.Module,
    teacher: nn.Module | None,
    objective: Objective,
    share: float,
    autocast: torch.dtype | None,
    example_inputs: Any = None,
) -> StepLoss:
    """The loss of that name, or the callable as it is. Raises ValueError for an unknown name, a teacher that is lacking
    or that nobody would ask, and a model whose features can't be matched with the teacher's.

    example_inputs: of the teacher's forward, for "features", where its class isn't known.
    """
    if callable(loss):
        return loss
    name: RecoveryLoss = loss or ("noise" if teacher is None else "distillation")
    check_choice("loss", name, RecoveryLoss)
    if (name == "noise") != (teacher is None):
        what = "needs a teacher: give teacher=, the dense model" if teacher is None else "asks no teacher: leave it out"
        raise ValueError(f"loss={name!r} {what}")
    if teacher is None:
        return objective.loss
    if name == "features":
        layers = shared_layers(model, teacher, example_inputs)
        return FeatureDistillation(teacher, objective, share, autocast, layers=layers)
    if name == "second-order":
        if objective.kind in ("reconstruction", "loss_fn"):
            raise ValueError("loss='second-order' is for denoisers: it moves the noisy images")
        return SecondOrder(teacher, objective, share, autocast)
    return Distillation(teacher, objective, MIX if name == "mixed" and share == 1 else share, autocast)
