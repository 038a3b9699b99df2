"""What is checked before scoring begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..choices import Estimator, VariantName, check_choice
from ..plan.plan import Plan
from .criteria import VARIANTS, Criterion, Variant
from .tables import UnitTable

AUTOCAST = {None: None, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, torch.bfloat16: torch.bfloat16}


def check_numbers(
    threshold: float | None, micro_batch: int, min_samples: int, max_samples: int, agreement_ratio: float
) -> None:
    if threshold is not None and not 0 <= threshold < 1:
        raise ValueError(f"threshold is the share of the largest loss, 0 <= threshold < 1, not {threshold}")
    if micro_batch < 1 or max_samples < 1 or min_samples > max_samples:
        raise ValueError(
            f"micro_batch={micro_batch}, min_samples={min_samples}, max_samples={max_samples}: "
            "all in samples, positive, the minimum not above the maximum"
        )
    if not 0 < agreement_ratio < 1:
        raise ValueError(f"agreement_ratio is a share of each group's units, between 0 and 1, not {agreement_ratio}")


def check_choices(estimator: str, criterion: str, variant: str | None, autocast: Any) -> Variant:
    check_choice("estimator", estimator, Estimator)
    if autocast not in AUTOCAST:
        raise ValueError(f"autocast is None or 'bf16', not {autocast!r} (half precision loses small gradients)")
    if variant is None:
        return Variant()
    if not estimator.startswith("reference") or criterion != "diff-pruning":
        raise ValueError(
            f"variant={variant!r} is a reading of the reference's loop: use it with estimator='reference' (or "
            f"'reference-quad') and criterion='diff-pruning', not {estimator!r} and {criterion!r}"
        )
    check_choice("variant", variant, VariantName)
    return VARIANTS[variant]


def check_plan(model: nn.Module, plan: Plan, table: UnitTable) -> None:
    parameters = dict(model.named_parameters())
    for name in table.parameters:
        p = parameters.get(name)
        if p is None or tuple(p.shape) != tuple(plan.shapes[name]):
            has = "no such parameter" if p is None else f"shape {tuple(p.shape)}"
            raise ValueError(
                f"the plan is not of this model: {name} has shape {tuple(plan.shapes[name])} in the plan, the model "
                f"has {has}; trace the model again"
            )
        if not p.is_floating_point():
            raise ValueError(f"{name} is {p.dtype}: quantised weights have no gradient, score the model before that")


def check_sharded(estimator: str, rule: Criterion) -> None:
    """Raise ValueError for what a model that is spread over ranks can't be scored by."""
    if rule.needs_data and estimator.startswith("reference"):
        raise ValueError(
            f"estimator={estimator!r} is for whole models: score one that FSDP2 has sharded with estimator='micro'"
        )
    if rule.values is not None:
        raise ValueError("a criterion with values of its own looks at whole weights: give it the model before sharding")


def check_timesteps(timesteps: Sequence[int], n: int) -> np.ndarray:
    asked = np.unique(np.asarray(list(timesteps)))
    if asked.size == 0 or not np.issubdtype(asked.dtype, np.integer) or asked[0] < 0 or asked[-1] >= n:
        raise ValueError(f"timesteps must be integers from 0 to {n - 1}, at least one; got {list(timesteps)[:8]}")
    return asked.astype(np.int64)
