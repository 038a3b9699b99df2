"""Saving and loading pruned models: safetensors and JSON, nothing that runs."""

from __future__ import annotations

from .errors import CheckpointError
from .loading import from_pretrained
from .saving import save

__all__ = ["CheckpointError", "from_pretrained", "save"]
