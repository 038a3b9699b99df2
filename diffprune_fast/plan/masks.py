"""From masks of weights, as mask training and ``torch.nn.utils.prune`` make them, to a keep-set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .plan import Plan


def keep_from_masks(plan: Plan, masks: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The units that masks leave.

    A place has a say if the mask of its parameter is zero for all of some channel. A unit goes where every place that
    has a say is zero for all of its channels, so masks of the layers that make the channels are enough.

    Args:
        plan: what :func:`~diffprune_fast.trace` gave.
        masks: parameter to an array or tensor of its shape; what is zero is masked.

    Returns:
        Every group's name to the sorted indices of its units that stay. Whether its constraints (equal norm groups and
        heads) hold is :func:`~diffprune_fast.prune`'s to check.

    Raises:
        ValueError: a mask of a parameter that the plan doesn't know, or of another shape.

    Example:
        >>> import torch
        >>> from diffprune_fast import trace
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
        >>> plan = trace(model, (torch.zeros(1, 4),))
        >>> pruned = torch.nn.utils.prune.ln_structured(model[0], "weight", amount=2, n=2, dim=0)
        >>> len(keep_from_masks(plan, {"0.weight": model[0].weight_mask})["0"])
        4
    """
    arrays = {name: np.asarray(m.cpu() if hasattr(m, "cpu") else m) != 0 for name, m in masks.items()}
    for name, mask in arrays.items():
        if mask.shape != plan.shapes.get(name):
            expected = plan.shapes.get(name, "none: the plan doesn't have it")
            raise ValueError(f"the mask of {name} has shape {mask.shape}, its parameter {expected}")
    keep = {}
    for group in plan.groups:
        goes = None
        for m in group.members:
            if m.parameter not in arrays:
                continue
            channels = np.moveaxis(arrays[m.parameter], m.dim, 0)
            zero = ~channels.reshape(len(channels), -1).any(1)
            if zero.any():
                goes = zero[m.index].all(1) if goes is None else goes & zero[m.index].all(1)
        keep[group.name] = np.arange(group.n_units) if goes is None else np.flatnonzero(~goes)
    return keep
