"""DistributedDataParallel around a model that is sliced: its reducer waits for gradients that no longer come to it."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import nn


def reducers_of(model: nn.Module) -> list[nn.Module]:
    """Every DistributedDataParallel of this process that holds the model, or holds what holds it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    kind = nn.parallel.DistributedDataParallel
    return [x for x in gc.get_objects() if issubclass(type(x), kind) and any(m is model for m in x.modules())]


def refuse_forward(reducer: nn.Module, args: Any = ()) -> None:
    """A forward hook: without it the ranks would go on without an error, each with its own gradients."""
    raise RuntimeError(
        "the model was pruned since DistributedDataParallel was put around it, which would reduce the gradients of the "
        "former parameters: put a new one around it (DistributedDataParallel(model), accelerator.prepare(model))"
    )
