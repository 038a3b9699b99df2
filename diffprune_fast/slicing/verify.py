"""Verification before slicing: keep-set, model and plan fit, and the sliced model's channels still go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from ..architectures.attached import check_attached
from ..architectures.inputs import calls_of
from ..choices import NormGroups, check_choice
from ..objective.checks import check_whole
from ..ops.slice_channels import check_kind
from ..plan.constraints import violations
from ..plan.keep_sets import Sliced
from ..plan.plan import Plan
from ..pruned.held_tensors import tables
from ..tracing.channels import Channels
from ..tracing.verification import VerificationError, verify_sliced


class SliceError(ValueError):
    """A model can't be sliced as asked. The model is as it was."""


def check_model(model: nn.Module, plan: Plan) -> None:
    """The model has the parameters that the plan speaks of, whole."""
    try:
        check_whole(model)
        check_attached(model)
    except ValueError as error:
        raise SliceError(str(error)) from None
    channels = Channels.of(model)
    if type(model).__name__ != plan.model_class or channels.shapes != dict(plan.shapes):
        differing = sorted(set(channels.shapes.items()) ^ set(plan.shapes.items()))
        where = f"; first difference: {differing[0][0]}" if differing else ""
        raise SliceError(
            f"the plan is of another model ({plan.model_class}, here {type(model).__name__}){where}. "
            "A model that was pruned needs a new plan: call trace() again"
        )
    for name, _, _, t in tables(model):
        if t.device.type == "meta":
            raise SliceError(f"{name} is on the meta device and has no data to slice: load the weights first")


def check_tensors(model: nn.Module, sliced: Sliced) -> None:
    """What is to be sliced are plain tensors, which can be walked on meta and whose memory is their own."""
    names = {name for name, _ in sliced.kept}
    for name, _, _, t in tables(model):
        if name in names:
            try:
                check_kind(name, t)
            except TypeError as error:
                raise SliceError(str(error)) from None


def check_keep(plan: Plan, keep: Mapping[str, Any], norm_groups: NormGroups) -> dict[str, np.ndarray]:
    """The keep-set as int64 arrays, or an error that says what is wrong with it."""
    try:
        check_choice("norm_groups", norm_groups, NormGroups)
    except ValueError as error:
        raise SliceError(str(error)) from None
    arrays = {n: np.asarray(v.cpu() if isinstance(v, torch.Tensor) else v) for n, v in keep.items()}
    bad = violations(plan, arrays, norm_groups)
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise SliceError(f"the keep-set can't be sliced: {bad[0]}{more}")
    return {n: v.astype(np.int64) for n, v in arrays.items()}


def retrace(
    model: nn.Module,
    plan: Plan,
    sliced: Sliced,
    norm_groups: NormGroups,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None,
) -> None:
    """Walk the sliced model on meta, with the labels of the channels that it kept, against the plan."""
    try:
        verify_sliced(model, plan, sliced, norm_groups, calls_of(model, example_inputs))
    except VerificationError as error:
        raise SliceError(str(error)) from error
