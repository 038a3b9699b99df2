"""Torch-Pruning itself, or the error that says how to get it."""

from __future__ import annotations

try:
    import torch_pruning as tp
except ImportError as error:
    raise ImportError(
        "diffprune_fast.integrations.torch_pruning works inside Torch-Pruning, which isn't installed: "
        "pip install torch-pruning==1.6.1"
    ) from error

__all__ = ["tp"]
