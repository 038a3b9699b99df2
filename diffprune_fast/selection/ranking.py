"""From scores to an order in which units go that never breaks a constraint."""

from __future__ import annotations

import numpy as np

from ..plan.plan import Plan


def check_scores(plan: Plan, values: np.ndarray) -> np.ndarray:
    """Scores as ``(n_units,)`` float64.

    Raises ValueError for another length and for NaN or infinity, naming the groups.
    """
    values = np.asarray(values, np.float64)
    if values.shape != (plan.n_units,):
        raise ValueError(
            f"scores have shape {values.shape}, the plan of {plan.model_class} has {plan.n_units} units: "
            "score with the plan that is selected from"
        )
    bad = ~np.isfinite(values)
    if bad.any():
        groups = np.unique(np.searchsorted(plan.offsets, np.flatnonzero(bad), side="right") - 1)
        names = ", ".join(plan.groups[g].name for g in groups[:3]) + (", ..." if len(groups) > 3 else "")
        raise ValueError(
            f"{int(bad.sum())} of {len(values)} scores are NaN or infinite (groups {names}): look for NaN in the "
            "model's weights and for a loss that overflows"
        )
    return values


def normalised(plan: Plan, values: np.ndarray) -> np.ndarray:
    """Each group's scores divided by their mean, so that groups compare; a group of zeros counts as average.

    Without it a global ranking collapses onto the layers with the smallest gradients.
    """
    sizes = np.diff(plan.offsets)
    group_of = np.repeat(np.arange(len(sizes)), sizes)
    mean = np.bincount(group_of, weights=np.abs(values), minlength=len(sizes)) / np.maximum(sizes, 1)
    out = np.ones_like(values)
    np.divide(values, mean[group_of], out=out, where=mean[group_of] > 0)
    return out
