"""Whole residual blocks: what each is worth to the loss, and models without those that are worth least.

Where width is not enough. ``blocks`` finds them, ``scoring`` says what removing each would cost, ``dropping`` takes
them out.
"""

from __future__ import annotations

from .blocks import Block, find_blocks
from .dropping import DepthError, drop_blocks
from .passthrough import Passthrough
from .scoring import BlockScores, score_blocks

__all__ = ["Block", "BlockScores", "DepthError", "Passthrough", "drop_blocks", "find_blocks", "score_blocks"]
