"""The processes of torch.distributed that share the work."""

from __future__ import annotations

import torch
from torch import Tensor


def rank_and_count() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) where torch.distributed is not in use."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def summed_over_ranks(values: Tensor) -> Tensor:
    """A copy of ``values``, added up over all ranks."""
    values = values.clone()
    if rank_and_count()[1] > 1:
        torch.distributed.all_reduce(values)
    return values
