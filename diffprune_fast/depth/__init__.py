"""Whole residual blocks: what each is worth to the loss, and models without those that are worth least."""

from __future__ import annotations

from .drop_blocks import DepthError, drop_blocks
from .find_blocks import find_blocks
from .score_blocks import score_blocks

__all__ = ["DepthError", "drop_blocks", "find_blocks", "score_blocks"]
