"""What a model was trained with: its batches, its conditioning, its loss."""

from __future__ import annotations

from .calls import first_call
from .image_folder import ImageFolder
from .loss import LossFunction, Objective, make_objective

__all__ = ["ImageFolder", "LossFunction", "Objective", "first_call", "make_objective"]
