"""Saving and loading pruned models: safetensors and JSON, nothing that runs."""

from __future__ import annotations

from .loading import from_pretrained
from .manifest import CheckpointError
from .saving import save
from .training import PrunedClass

__all__ = ["CheckpointError", "PrunedClass", "from_pretrained", "save"]
