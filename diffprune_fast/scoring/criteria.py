"""From (theta, gradient) to a score, and the reference's three readings of the same method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points

import numpy as np
from torch import nn

from ..plan.plan import Member, Plan
from .tables import is_norm


@dataclass(frozen=True)
class Criterion:
    """element: what the kernel sums over a channel (``ops.CRITERIA``); None: no sum at all.

    needs_data: gradients are needed. thresholded: only timesteps with ``L_t > T * L_max`` count. values: in place of a
    sum ``(model, plan) -> (plan.n_units,)``, for a criterion that looks at the weights only.
    """

    element: str | None
    needs_data: bool = True
    thresholded: bool = True
    values: Callable[[nn.Module, Plan], np.ndarray] | None = None


CRITERIA: Mapping[str, Criterion] = {
    # sum |theta * g| over the timesteps that matter (Fang et al., 2023, eq. 7)
    "diff-pruning": Criterion("abs"),
    # |sum theta * g| over all parameters of a unit and all timesteps: what a first-order expansion says of its removal
    "taylor": Criterion("signed", thresholded=False),
    # sum (theta * g)^2, the diagonal of the empirical Fisher information as the second-order term
    "fisher": Criterion("square"),
    # the L2 norm of the unit's weights
    "magnitude": Criterion("magnitude", needs_data=False),
    "random": Criterion(None, needs_data=False),
}


# Where other packages name criteria of theirs: a Criterion, or a function as its ``values``.
ENTRY_POINTS = "diffprune_fast.criteria"


def criterion_of(name: str) -> Criterion:
    """The criterion of that name, of ours or of a package that is installed. Raises ValueError, TypeError."""
    if name in CRITERIA:
        return CRITERIA[name]
    found = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if name not in found:
        known = ", ".join(map(repr, [*CRITERIA, *sorted(found)]))
        raise ValueError(f"criterion={name!r}: choose one of {known}")
    made = found[name].load()
    if isinstance(made, Criterion):
        return made
    if not callable(made):
        raise TypeError(f"criterion {name!r} ({found[name].value}) is neither a Criterion nor a function: {made!r}")
    return Criterion(None, needs_data=False, thresholded=False, values=made)


@dataclass(frozen=True)
class Variant:
    """One reading of the reference's loop: one batch, one noise, t = 0, 1, 2, …

    element: what is summed over a channel of a convolution's or linear layer's weight. norms: the same for norm
    layers' weights; None: not counted. biases: whether biases (and every other vector) count. loss: the reduction.
    stop: at the first ``L_t < T * running max``, ``"before"`` or ``"after"`` its gradient is added; ``"set"``: no stop,
    all t with ``L_t > T * L_max``. threshold: its own T. same_length: members that a unit touches more often than
    others (a concat's) are left out. normalise: scores are divided by their group's mean.
    """

    element: str = "abs"
    norms: str | None = "abs"
    biases: bool = True
    loss: str = "mean"
    stop: str = "before"
    threshold: float = 0.05
    same_length: bool = False
    normalise: bool = False


VARIANTS: Mapping[str, Variant] = {
    "paper": Variant(stop="set"),
    "ddpm_exp": Variant("square", "abs", biases=False, loss="pixel_sum", same_length=True),
    "ddpm_prune": Variant("abs", None, biases=False, stop="after", normalise=True),
    "ldm_exp": Variant("abs", None, biases=False, threshold=0.1),
}


def counted_members(
    plan: Plan, model: nn.Module, variant: Variant
) -> tuple[dict[str, list[Member]], dict[str, list[Member]]]:
    """Per group: the members that a variant counts by ``element``, and those that it counts by another ``norms``."""
    modules = dict(model.named_modules())
    plain: dict[str, list[Member]] = {}
    norms: dict[str, list[Member]] = {}
    for group in plan.groups:
        least = min((m.index.shape[1] for m in group.members), default=1)
        for member in group.members:
            owner, _, leaf = member.parameter.rpartition(".")
            norm = owner in modules and is_norm(modules[owner])
            vector = leaf == "bias" or (not norm and len(plan.shapes[member.parameter]) < 2)
            if (vector and not variant.biases) or (variant.same_length and member.index.shape[1] > least):
                continue
            if not norm or variant.norms == variant.element:
                plain.setdefault(group.name, []).append(member)
            elif variant.norms is not None:
                norms.setdefault(group.name, []).append(member)
    return plain, norms


def divided_by_group_mean(plan: Plan, values: np.ndarray) -> np.ndarray:
    """Every group's scores divided by their mean; a group of zeros stays zero.

    The reference takes the mean over a group's members first: a factor that the division takes out again.
    """
    out = values.copy()
    for start, stop in zip(plan.offsets[:-1], plan.offsets[1:]):
        mean = values[start:stop].mean() if stop > start else 0.0
        if mean > 0:
            out[start:stop] /= mean
    return out
