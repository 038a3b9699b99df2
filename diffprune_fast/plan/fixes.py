"""Weights that take a factor when channels go, so that the channels which stay compute what they did."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ScaleFix:
    """A softmax whose scale follows the head size: what to multiply when head dims are removed.

    place: the attention product. n_dims: the head size before. units: ``(n_dims,)``, the plan-wide units of one head's
    dims, -1 for those that always stay. targets: each ``(parameter, rows)`` is multiplied by
    ``sqrt(kept / n_dims)``, where ``kept`` is how many of ``units`` stay.
    """

    place: str
    n_dims: int
    units: np.ndarray
    targets: tuple[tuple[str, np.ndarray], ...]


@dataclass(frozen=True)
class NormFix:
    """A weight of which only the direction counts (weight_norm): its rows' norms change when its columns go.

    gain: the parameter that holds the rows' norms, along its dim 0; every row of it is multiplied by what is left of
    the norm of the same row of ``direction``.
    """

    gain: str
    direction: str
