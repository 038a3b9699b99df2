"""Pruned models that a plain diffusers config describes: which counts it means, and what else it asks for."""

from __future__ import annotations

from .target import Target, target_of

__all__ = ["Target", "target_of"]
