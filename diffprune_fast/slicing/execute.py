"""The one place that changes a model: after all checks, one call slices every tensor."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from ..plan.keep_sets import Sliced, alive_units
from ..plan.plan import Plan
from ..pruned.held_tensors import tables
from ..pruned.kept_columns import keep_columns
from .optimizers import state_of
from .reducers import reducers_of, refuse_forward


def slice_model(
    model: nn.Module, plan: Plan, sliced: Sliced, optimizer: torch.optim.Optimizer | None, backend: str
) -> None:
    """Slice parameters, buffers, gradients and optimiser state; then set the attributes and fold in the scales."""
    wanted: dict[str, dict[int, np.ndarray]] = {}
    for (name, dim), index in sliced.kept.items():
        wanted.setdefault(name, {})[dim] = index
    factors: dict[str, list[tuple[np.ndarray, float]]] = {}
    for name, rows, factor in scale_factors(plan, sliced):
        factors.setdefault(name, []).append((rows, factor))
    tensors: list[Tensor] = []
    slices: list[ops.Slice] = []
    for name, _, _, t in tables(model):
        if name not in wanted and name not in factors:
            continue
        keep = {dim: torch.from_numpy(index) for dim, index in wanted.pop(name, {}).items()}
        scale = _row_scale(t, keep, factors.pop(name, []))
        # a weight that grew by a factor has a gradient that shrank by it
        for x, power in ((t, 1), (t.grad, -1), *state_of(optimizer, t)):
            if x is not None:
                tensors.append(x)
                slices.append(ops.Slice(keep, scale**power if scale is not None and power else None))
    ops.slice_channels_(tensors, slices, backend=backend)
    modules = dict(model.named_modules())
    for path, value in sliced.attributes.items():
        module, _, name = path.rpartition(".")
        setattr(modules[module], name, value)
    keep_columns(model, sliced.kept, plan.shapes)
    for reducer in reducers_of(model) if tensors else ():
        reducer.register_forward_pre_hook(refuse_forward)


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
