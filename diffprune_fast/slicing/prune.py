"""Removing channels: check everything, then slice parameters, gradients and optimiser state in place."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from ..checkpoint.saving import replace_save_pretrained
from ..choices import NormGroups
from ..plan.keep_sets import Sliced, sliced_shapes
from ..plan.plan import Complexity, Plan
from ..pruned.record import attach_record, before_pruning
from ..result import PruneResult, record
from .execute import slice_model
from .optimizers import check_optimizer
from .verify import check_keep, check_model, retrace


def dry_run(
    model: nn.Module,
    plan: Plan,
    keep: Mapping[str, np.ndarray],
    *,
    norm_groups: NormGroups = "count",
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
) -> Sliced:
    """Check a keep-set and run the sliced model on the meta device; nothing of the model changes.

    The sliced model is traced with the labels of the channels it kept: wherever channels meet, they must be ones that
    the plan has put together, and norm groups and heads must have kept their members.

    Raises:
        SliceError: the keep-set, the plan and the model don't fit one another; the message says where.
    """
    check_model(model, plan)
    keep = check_keep(plan, keep, norm_groups)
    sliced = sliced_shapes(model, plan, keep)
    retrace(model, plan, sliced, norm_groups, example_inputs)
    return sliced


def prune(
    model: nn.Module,
    plan: Plan,
    keep: Mapping[str, np.ndarray],
    *,
    norm_groups: NormGroups = "count",
    inplace: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
    backend: str = "auto",
) -> PruneResult:
    """Remove every unit that ``keep`` doesn't list, with all the channels that belong to it.

    keep: group name to the sorted indices of the units that stay, ``(n_kept,)`` integers; groups that aren't named
    stay whole. norm_groups: ``"exact"`` (every GroupNorm group keeps its members) or ``"count"`` (only divisibility).
    ``inplace=False`` prunes a copy. ``optimizer``: its per-element state is sliced too; state of another shape
    (factored moments, as Adafactor's) is refused. ``example_inputs``: what :func:`trace` was given, if it was.

    Parameters keep their identity (optimisers, hooks and ties stay valid), their dtype, device, memory format and
    ``requires_grad``; gradients are sliced with them. Where the softmax scale follows the head size, the weights that
    feed the queries take the correction, so that nothing but the removed channels changes; their gradients and moments
    (``exp_avg``, ``exp_avg_sq``, ``max_exp_avg_sq``, ``momentum_buffer``) take the inverse, other state stays.

    Raises:
        SliceError: something doesn't fit. Everything is checked before the first byte changes.
    """
    check_optimizer(model, optimizer, inplace)
    started = time.perf_counter()
    sliced = dry_run(model, plan, keep, norm_groups=norm_groups, example_inputs=example_inputs)
    check_optimizer(model, optimizer, inplace, {name for name, _ in sliced.kept})
    checked = time.perf_counter()
    if not inplace:
        model = copy.deepcopy(model)
    before = before_pruning(model, plan)
    slice_model(model, plan, sliced, optimizer, backend)
    attach_record(model, before)
    replace_save_pretrained(model)
    done = time.perf_counter()
    counts = plan.counts(sliced.keep)
    return record(
        PruneResult(
            model=model,
            plan=plan,
            keep=sliced.keep,
            before=Complexity(plan.params(), plan.macs()),
            after=Complexity(plan.params(counts), plan.macs(counts)),
            norm_groups=norm_groups,
            shapes=sliced.shapes,
            attributes=sliced.attributes,
            seconds={"verify": checked - started, "slice": done - checked},
        )
    )
