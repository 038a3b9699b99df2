"""Removing channels: check everything, then slice parameters, gradients and optimiser state in place."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..architectures.inputs import calls_of
from ..checkpoint.saving import replace_save_pretrained
from ..choices import NormGroups
from ..plan.keep_sets import Sliced, sliced_shapes
from ..plan.plan import Plan
from ..pruned.held_tensors import copied
from ..pruned.record import before_pruning
from ..result import PruneResult
from .commit import Change
from .execute import slicing_steps
from .optimizers import check_optimizer
from .proof import prove
from .verify import check_keep, check_model, check_tensors, retrace


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
    check_tensors(model, sliced)
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
    proof: bool = True,
) -> PruneResult:
    """Remove every unit that ``keep`` doesn't list, with all the channels that belong to it.

    Parameters keep their identity (optimisers, hooks and ties stay valid), their dtype, device, memory format and
    ``requires_grad``; gradients are sliced with them. Where the softmax scale follows the head size, the weights that
    feed the queries take the correction, so that nothing but the removed channels changes; their gradients and moments
    (``exp_avg``, ``exp_avg_sq``, ``max_exp_avg_sq``, ``momentum_buffer``) take the inverse, other state stays.

    Args:
        model: the model that ``plan`` was traced from.
        plan: what :func:`trace` gave.
        keep: group name to the sorted indices of the units that stay, ``(n_kept,)`` integers; groups that aren't
            named stay whole.
        norm_groups: ``"exact"`` (every GroupNorm group keeps its members) or ``"count"`` (only divisibility).
        inplace: False prunes a copy.
        optimizer: of the model's parameters; its per-element state is sliced too. State of another shape (factored
            moments, as Adafactor's) is refused.
        example_inputs: what :func:`trace` was given, if it was.
        proof: run one real forward of the sliced model, and one of the dense model with the removed channels masked,
            before anything changes: they must call the same operations and give the same output. ``result.proof`` says
            what that has shown; False leaves it out. Inputs without values are noise.
        backend: ``"auto"``, or who moves the channels, see :func:`~diffprune_fast.ops.slice_channels_`.

    Returns:
        The pruned model with its plan, its keep-sets and its figures.

    Raises:
        SliceError: something doesn't fit. Everything is checked, and all memory is taken, before the first byte
            changes; from there on it goes to the end. An interrupt that comes meanwhile is raised afterwards, with the
            result as its attribute ``result``.

    Example:
        >>> from diffprune_fast import trace
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> x = torch.zeros(1, 4)
        >>> result = prune(model, trace(model, (x,)), {"0": np.array([0, 5, 9])}, example_inputs=(x,))
        >>> model
        Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
          (1): ReLU()
          (2): Linear(in_features=3, out_features=2, bias=True)
        )
        >>> result.before.params, result.after.params
        (114, 23)
    """
    how: dict[str, Any] = {
        "norm_groups": norm_groups,
        "example_inputs": example_inputs,
        "backend": backend,
        "proof": proof,
    }
    return checked(model, plan, keep, inplace=inplace, optimizer=optimizer, **how).made()


def checked(
    model: nn.Module,
    plan: Plan,
    keep: Mapping[str, np.ndarray],
    *,
    norm_groups: NormGroups,
    inplace: bool,
    optimizer: torch.optim.Optimizer | None,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None,
    backend: str,
    proof: bool,
) -> Change:
    """All of :func:`prune` that can fail, before its first change."""
    check_optimizer(model, optimizer, inplace)
    started = time.perf_counter()
    sliced = dry_run(model, plan, keep, norm_groups=norm_groups, example_inputs=example_inputs)
    check_optimizer(model, optimizer, inplace, {name for name, _ in sliced.kept})
    proven = prove(model, plan, sliced, calls_of(model, example_inputs)) if proof else None
    if not inplace:
        model = copied(model)
    seconds = {"verify": time.perf_counter() - started}
    change = prepared(model, plan, sliced, norm_groups, optimizer, backend, seconds=seconds)
    return change.and_then((), proof=proven)


def prepared(
    model: nn.Module,
    plan: Plan,
    sliced: Sliced,
    norm_groups: NormGroups,
    optimizer: torch.optim.Optimizer | None,
    backend: str,
    *,
    solved: Mapping[str, Tensor] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> Change:
    """Everything that a pruning does between its checks and the first change.

    sliced: what :func:`dry_run` gave. solved: as in :func:`slicing_steps`. seconds: of stages before.
    """
    check_model(model, plan)
    began = time.perf_counter()
    record = before_pruning(model, plan)
    steps = slicing_steps(model, plan, sliced, optimizer, backend, solved)
    taken = {**(seconds or {}), "slice": 0.0}
    result = PruneResult(
        model=model,
        plan=plan,
        keep=sliced.keep,
        before=plan.complexity(),
        after=plan.complexity(sliced.keep),
        norm_groups=norm_groups,
        shapes=sliced.shapes,
        attributes=sliced.attributes,
        seconds=taken,
    )
    taken["slice"] = time.perf_counter() - began
    return Change(result, [*steps, partial(replace_save_pretrained, model)], record)
