"""The two operations that touch every weight, and who can run them.

:func:`channel_scores_` turns weights and gradients into one score per unit, :func:`slice_channels_` removes channels
in place. ``ops.reference`` has both in plain PyTorch.
"""

from __future__ import annotations

from . import reference
from .channel_scores import CRITERIA, BoundScores, ScoreEntry, ScoreTable, channel_scores_
from .dispatch import BackendError, backends
from .info import info
from .slice_channels import Slice, slice_channels_

__all__ = [
    "CRITERIA",
    "BackendError",
    "BoundScores",
    "ScoreEntry",
    "ScoreTable",
    "Slice",
    "backends",
    "channel_scores_",
    "info",
    "reference",
    "slice_channels_",
]
