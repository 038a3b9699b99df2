"""Which wish it is that ``score_and_prune`` was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..choices import Layouts, NormGroups, check_choice
from .conform import replaced_places
from .layout import Layout
from .wish import Like, Wish


def wish_for(
    model: nn.Module,
    *,
    like: Any,
    layout: Layouts,
    budget: Mapping[str, float | None],
    norm_groups: NormGroups,
    steps: int,
    optimizer: torch.optim.Optimizer | None,
    options: Mapping[str, Any],
) -> Wish:
    """What ``score_and_prune`` was asked for.

    Raises ValueError for two wishes at once, or options that say nothing about a config.
    """
    check_choice("layout", layout, Layouts)
    if like is None and layout == "free":
        return Wish(**budget, norm_groups=norm_groups, **options)
    given = [f"{name}={value}" for name, value in budget.items() if value is not None]
    kept = {name: options[name] for name in ("offsets", "round_to", "max_ratio") if name in options}
    said = [name for name, value in options.items() if name not in kept and value]
    if like is None:
        if said:
            raise ValueError(f"layout='config' gives every width that a config doesn't: leave out {', '.join(said)}")
        if optimizer is not None:
            raise ValueError("layout='config' may give the time embedding other sinusoids: leave optimizer out")
        return Layout(model, budget, steps, norm_groups, **kept)
    if given or said:
        raise ValueError(f"like= gives every width: leave out {', '.join([*given, *said])}")
    wish = Like(model, like, steps, norm_groups=norm_groups, **{n: v for n, v in kept.items() if n == "offsets"})
    if optimizer is not None and replaced_places(model, wish.target):
        raise ValueError(
            "like= gives the time embedding other sinusoids, which the optimizer's state can't follow: leave optimizer "
            "out and make a new one"
        )
    return wish
