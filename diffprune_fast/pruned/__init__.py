"""What a pruned module carries with it."""

from __future__ import annotations

from .kept_columns import KeptColumns
from .passthrough import Passthrough

__all__ = ["KeptColumns", "Passthrough"]
