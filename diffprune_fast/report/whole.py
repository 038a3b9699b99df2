"""What stayed whole of a model, and why."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..plan.plan import UNUSED, Plan

# Of each reason, and the reasons that are shown: the rarest are left to the plan itself.
EXAMPLES, MOST = 2, 12
FULL = "could have gone, but the budget took nothing of its group"


@dataclass(frozen=True)
class Whole:
    """A reason, how many channels of how many places it keeps, and some of those places."""

    reason: str
    places: int
    channels: int
    examples: tuple[str, ...]


def kept_whole(plan: Plan, keep: Mapping[str, np.ndarray] | None = None) -> list[Whole]:
    """Why channels stayed: what tracing froze, the most first, then the groups of which ``keep`` has every unit.

    Args:
        plan: what :func:`diffprune_fast.trace` gave.
        keep: group name to the units that stay.

    Returns:
        One entry for each reason, at most ``MOST`` of the frozen ones.

    Example:
        >>> import torch
        >>> from diffprune_fast import trace
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Linear(16, 2))
        >>> for found in kept_whole(trace(model, (torch.zeros(1, 4),))):
        ...     print(found.reason, found.channels, *found.examples, sep="; ")
        meets an unlabelled dimension in linear; 4; 0.weight (inputs)
        is an output of the model; 4; 1.weight (outputs); 1.bias (outputs)
    """
    places: dict[str, list[tuple[str, int]]] = {}
    for place, reason in plan.frozen.items():
        name, _, dim = place.rpartition(":")
        if name not in plan.buffers and not (reason == UNUSED and int(dim) > 1):  # the sizes of kernels
            width = plan.shapes[name][int(dim)]
            side = ("outputs", "inputs")[int(dim)] if int(dim) < 2 else f"dim {dim}"
            places.setdefault(_without_place(reason), []).append((f"{name} ({side})", width))
    found = [
        Whole(reason, len(all_of), sum(width for _, width in all_of), tuple(name for name, _ in all_of[:EXAMPLES]))
        for reason, all_of in places.items()
    ]
    found = sorted(found, key=lambda whole: -whole.channels)[:MOST]
    full = [group for group in plan.groups if keep is not None and len(keep[group.name]) == group.n_units]
    if full:
        channels = sum(group.n_units for group in full)
        found.append(Whole(FULL, len(full), channels, tuple(group.name for group in full[:EXAMPLES])))
    return found


def _without_place(reason: str) -> str:
    """A reason without the module it was found in, so that the same ones count together."""
    return re.sub(r"(in|of|by|over) \S+ \((\w+)\)", r"\1 \2", reason)
