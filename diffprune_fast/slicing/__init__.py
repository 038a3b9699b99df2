"""Removing channels: check everything, then slice parameters, gradients and optimiser state in place."""

from __future__ import annotations

from .optimizers import check_optimizer
from .prune import dry_run, prune
from .sharded import prune_sharded
from .verify import SliceError

__all__ = ["SliceError", "check_optimizer", "dry_run", "prune", "prune_sharded"]
