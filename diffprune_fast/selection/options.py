"""The choices of :func:`select`, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from ..choices import Allocation, Offsets, RankingName, Rounding
from .costs import Cost


class SelectOptions(TypedDict, total=False):
    """The keywords of :func:`select` that :func:`score_and_prune` hands on."""

    budgets: Mapping[str, float]
    costs: Mapping[str, Cost]
    counts: Mapping[str, int] | None
    ranking: RankingName | None
    allocation: Allocation | str | None
    round_to: int | None
    offsets: Offsets
    rounding: Rounding | None
    ratios: Mapping[str, float] | None
    ignore: Sequence[str]
    max_ratio: float
