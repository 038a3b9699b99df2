"""Which channels matter: the diffusion loss's first-order expansion, estimated once and well."""

from __future__ import annotations

from .criteria import CRITERIA, VARIANTS
from .score import score
from .scores import BlockScores, LossCurve, Scores, keep_set_agreement

__all__ = ["CRITERIA", "VARIANTS", "BlockScores", "LossCurve", "Scores", "keep_set_agreement", "score"]
