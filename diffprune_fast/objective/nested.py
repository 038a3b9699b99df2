"""Tensors inside tuples, lists and dicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure of dicts, lists and tuples with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {k: map_tensors(v, change) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(v, change) for v in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(v, change) for v in value)
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in a structure of dicts, lists and tuples, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [x for v in value for x in tensors_in(v)] if isinstance(value, (list, tuple)) else []


def moved(batch: Any, device: torch.device) -> Any:
    """The batch on ``device``; what is no tensor stays as it is. The host doesn't wait for a CUDA device: from pageable
    memory it would, so copies go by pinned memory."""
    if device.type != "cuda":
        return map_tensors(batch, lambda x: x.to(device))
    return map_tensors(batch, lambda x: (x.pin_memory() if x.device.type == "cpu" else x).to(device, non_blocking=True))
