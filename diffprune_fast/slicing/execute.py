"""The one place that changes a model: after all checks, every change is made ready as a call."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from ..module_tree import modules_of, parameters_of
from ..ops.slice_channels import Step, set_data, slice_steps
from ..plan.keep_sets import Sliced, alive_units
from ..plan.plan import Plan
from ..pruned.held_tensors import tables
from ..pruned.kept_columns import columns_to_keep
from .optimizers import state_of
from .reducers import reducers_of, refuse_forward
from .verify import SliceError

# Rows after slicing, and what multiplies them: one number, or one for each.
Factor = tuple[np.ndarray, float | np.ndarray]


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
    tables_of = {id(index): torch.from_numpy(index) for index in sliced.kept.values()}  # one serves many places
    wanted: dict[str, dict[int, Tensor]] = {}
    for (name, dim), index in sliced.kept.items():
        wanted.setdefault(name, {})[dim] = tables_of[id(index)]
    factors: dict[str, list[Factor]] = {}
    for name, rows, factor in scale_factors(model, plan, sliced):
        factors.setdefault(name, []).append((rows, factor))
    tensors: list[Tensor] = []
    slices: list[ops.Slice] = []
    names: list[str] = []
    steps: list[Step] = []
    for name, _, _, t in tables(model):
        if name not in wanted and name not in factors:
            continue
        keep = wanted.pop(name, {})
        scale = row_scale(t, keep, factors.pop(name, []))
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
    of_model = parameters_of(model)
    for name, solution in solved.items():
        steps += set_data(of_model[name], solution)
    modules = modules_of(model)
    for path, value in sliced.attributes.items():
        module, _, name = path.rpartition(".")
        steps.append(partial(setattr, modules[module], name, value))
    steps += [partial(c.attach, module) for module, c in columns_to_keep(model, sliced.kept, plan.shapes)]
    if sliced.kept:
        steps += [partial(r.register_forward_pre_hook, refuse_forward) for r in reducers_of(model)]
    return steps


def row_scale(t: Tensor, keep: dict[int, Tensor], factors: Sequence[Factor]) -> Tensor | None:
    """``(kept rows,)``, None where nothing is scaled. ``factors``: rows after slicing, and what multiplies them."""
    if not factors:
        return None
    scale = torch.ones(len(keep[0]) if 0 in keep else t.shape[0], dtype=torch.float64)
    for rows, factor in factors:
        scale[torch.from_numpy(rows)] *= torch.as_tensor(factor, dtype=torch.float64)
    return scale


def scale_factors(model: nn.Module, plan: Plan, sliced: Sliced) -> list[tuple[str, np.ndarray, float | np.ndarray]]:
    """(parameter, its rows after slicing, factor) that keep the softmax scale and weights by their norm what they were.

    Raises SliceError where nothing is left of a row that only has a direction.
    """
    alive = alive_units(plan, sliced.keep)
    found: list[tuple[str, np.ndarray, float | np.ndarray]] = []
    for fix in plan.scale_fixes:
        left = int(alive[fix.units].sum())
        if left == fix.n_dims:
            continue
        for name, rows in fix.targets:
            kept = sliced.kept.get((name, 0))
            where = rows if kept is None else np.flatnonzero(np.isin(kept, rows))
            found.append((name, where, math.sqrt(left / fix.n_dims)))
    for gain, factors in norm_factors(model, plan, sliced).items():
        kept = sliced.kept.get((gain, 0))
        factors = factors if kept is None else factors[kept]
        if not np.isfinite(factors).all() or (factors == 0).any():
            raise SliceError(
                f"{gain} holds the norm of a row of which the keep-set leaves nothing but zeros: keep another input of "
                f"it, or take the norm out of the weight first (torch.nn.utils.parametrize.remove_parametrizations)"
            )
        found.append((gain, np.arange(len(factors)), factors))
    return found


def norm_factors(model: nn.Module, plan: Plan, sliced: Sliced) -> dict[str, np.ndarray]:
    """Of every gain whose weight loses columns, for each row before slicing, what is left of the row's norm."""
    tensors = {name: t for name, _, _, t in tables(model)}
    found = {}
    for fix in plan.norm_fixes:
        left = whole = tensors[fix.direction].detach().to("cpu", torch.float64)
        for dim in range(1, whole.dim()):
            if (fix.direction, dim) in sliced.kept:
                left = left.index_select(dim, torch.from_numpy(sliced.kept[fix.direction, dim]))
        if left is not whole:
            found[fix.gain] = (left.flatten(1).norm(dim=1) / whole.flatten(1).norm(dim=1)).numpy()
    return found
