"""Torch-Pruning with this package's kernels: its importances in one pass over the weights."""

from __future__ import annotations

from .acceleration import Acceleration, accelerate
from .importance import FusedImportance

__all__ = ["Acceleration", "FusedImportance", "accelerate"]
