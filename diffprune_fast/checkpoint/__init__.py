"""Saving and loading pruned models: safetensors and JSON, nothing that runs."""

from __future__ import annotations

from .errors import CheckpointError
from .loading import from_pretrained
from .saving import save
from .training import PrunedClass

__all__ = ["CheckpointError", "PrunedClass", "from_pretrained", "save"]
