"""Torch-Pruning itself, or the error that says how to get it."""

from __future__ import annotations

_WHERE = "diffprune_fast.integrations.torch_pruning works inside Torch-Pruning 1.6.0 and 1.6.1"

try:
    import torch_pruning as tp
except ImportError as error:
    raise ImportError(f"{_WHERE}, which isn't installed: pip install torch-pruning==1.6.1") from error
if not hasattr(tp.dependency, "index_mapping"):  # 1.6.0 doesn't say which version it is
    raise ImportError(f"{_WHERE}, the one installed is older: pip install torch-pruning==1.6.1")

__all__ = ["tp"]
