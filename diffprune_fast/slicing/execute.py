"""The one place that changes a model: after all checks, every change is made ready as a call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from ..ops.slice_channels import Step, set_data, slice_steps
from ..plan.keep_sets import Sliced, alive_units
from ..plan.plan import Plan
from ..pruned.held_tensors import tables
from ..pruned.kept_columns import columns_to_keep
from .optimizers import state_of
from .reducers import reducers_of, refuse_forward
from .verify import SliceError


def slicing_steps(
    model: nn.Module,
    plan: Plan,
    sliced: Sliced,
    optimizer: torch.optim.Optimizer | None = None,
    backend: str = "auto",
    solved: Mapping[str, Tensor] | None = None,
) -> list[Step]:
    """The calls that slice parameters, buffers, gradients and optimiser state, and set the attributes.

    solved: parameters that get these values, of the sliced shape, instead of a slice of their own. All memory that the
    calls need is taken here. Raises SliceError for tensors that can't be sliced.
    """
    solved = solved or {}
    wanted: dict[str, dict[int, np.ndarray]] = {}
    for (name, dim), index in sliced.kept.items():
        wanted.setdefault(name, {})[dim] = index
    factors: dict[str, list[tuple[np.ndarray, float]]] = {}
    for name, rows, factor in scale_factors(plan, sliced):
        factors.setdefault(name, []).append((rows, factor))
    tensors: list[Tensor] = []
    slices: list[ops.Slice] = []
    names: list[str] = []
    steps: list[Step] = []
    for name, _, _, t in tables(model):
        if name not in wanted and name not in factors:
            continue
        keep = {dim: torch.from_numpy(index) for dim, index in wanted.pop(name, {}).items()}
        scale = _row_scale(t, keep, factors.pop(name, []))
        own = [] if name in solved else [(name, t, 1)]
        # a weight that grew by a factor has a gradient that shrank by it
        for what, x, power in (*own, (f"{name}.grad", t.grad, -1), *state_of(optimizer, name, t)):
            if x is not None:
                names.append(what)
                tensors.append(x)
                slices.append(ops.Slice(keep, scale**power if scale is not None and power else None))
    try:
        steps += slice_steps(tensors, slices, backend=backend, names=names)
    except (ValueError, TypeError) as error:
        raise SliceError(str(error)) from error
    of_model = dict(model.named_parameters())
    for name, solution in solved.items():
        steps += set_data(of_model[name], solution)
    modules = dict(model.named_modules())
    for path, value in sliced.attributes.items():
        module, _, name = path.rpartition(".")
        steps.append(partial(setattr, modules[module], name, value))
    steps += [partial(c.attach, module) for module, c in columns_to_keep(model, sliced.kept, plan.shapes)]
    if sliced.kept:
        steps += [partial(r.register_forward_pre_hook, refuse_forward) for r in reducers_of(model)]
    return steps


def _row_scale(t: Tensor, keep: dict[int, Tensor], factors: list[tuple[np.ndarray, float]]) -> Tensor | None:
    """``(kept rows,)``, None where nothing is scaled. ``factors``: rows after slicing, and what multiplies them."""
    if not factors:
        return None
    scale = torch.ones(len(keep[0]) if 0 in keep else t.shape[0], dtype=torch.float64)
    for rows, factor in factors:
        scale[torch.from_numpy(rows)] *= factor
    return scale


def scale_factors(plan: Plan, sliced: Sliced) -> list[tuple[str, np.ndarray, float]]:
    """(parameter, its rows after slicing, factor) that keep the softmax scale what it was."""
    alive = alive_units(plan, sliced.keep)
    found = []
    for fix in plan.scale_fixes:
        left = int(alive[fix.units].sum())
        if left == fix.n_dims:
            continue
        for name, rows in fix.targets:
            kept = sliced.kept.get((name, 0))
            where = rows if kept is None else np.flatnonzero(np.isin(kept, rows))
            found.append((name, where, math.sqrt(left / fix.n_dims)))
    return found
