"""Size and cost of a model, without running it on data."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..plan.plan import Complexity
from ..tracing.trace import trace


def complexity(model: nn.Module, example_inputs: Any = None) -> Complexity:
    """Parameters, and multiply-accumulates of one forward of one sample, from the model's plan.

    ``example_inputs``: as for :func:`diffprune_fast.trace`; diffusers models need none.
    """
    plan = trace(model, example_inputs)
    return Complexity(plan.params(), plan.macs())
