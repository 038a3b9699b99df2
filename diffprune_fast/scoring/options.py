"""The choices of :func:`score`, by name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypedDict

import torch

from ..choices import Autocast, CriterionName, Estimator, VariantName
from ..objective.loss import LossFunction


class ScoreOptions(TypedDict, total=False):
    """The keywords of :func:`score` that :func:`score_and_prune` hands on."""

    scheduler: Any
    estimator: Estimator
    criterion: CriterionName
    variant: VariantName | None
    threshold: float | None
    micro_batch: int
    min_samples: int | None
    max_samples: int
    agreement: float
    agreement_ratio: float
    loss_fn: LossFunction | None
    progress: bool
    autocast: Autocast | torch.dtype | None
    timesteps: Sequence[int] | None
    damage: bool
    checkpoint: str | os.PathLike[str] | None
    backend: str
