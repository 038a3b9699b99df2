"""Size and cost of a model, without running it on data."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..plan.plan import Complexity
from ..tracing.trace import trace


def complexity(model: nn.Module, example_inputs: Any = None) -> Complexity:
    """Parameters, and multiply-accumulates of one forward of one sample, from the model's plan.

    Args:
        model: any module.
        example_inputs: as for :func:`diffprune_fast.trace`; diffusers models need none.

    Returns:
        ``params`` and ``macs``, whole numbers.

    Raises:
        TraceError, ValueError: as :func:`diffprune_fast.trace`.

    Example:
        >>> import torch
        >>> complexity(nn.Linear(4, 16), (torch.zeros(1, 4),))
        Complexity(params=80, macs=64)
    """
    return trace(model, example_inputs).complexity()
