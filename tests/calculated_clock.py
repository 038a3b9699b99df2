"""A clock that calculates seconds in place of measuring them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from diffprune_fast.evaluation import complexity
from diffprune_fast.footprint.recording import Operation

RATE = 1e-9  # seconds per multiply-accumulate


def macs_of(operation: Operation) -> int:
    """Multiply-accumulates of a convolution or linear layer of given sizes, 0 for anything else."""
    if not operation.name.startswith(("aten.conv", "aten.linear")):
        return 0
    weight, out = operation.shapes[1].sizes, operation.out.sizes
    return math.prod(out) // out[1 if "conv" in operation.name else -1] * math.prod(weight)


class CalculatedClock:
    """operations: seconds of one of given sizes; None is RATE times its MACs. fixed: seconds of any model beside its
    MACs. saves: how much of the MACs that a pruned model saves shows in its seconds. constant: seconds of any model,
    in place of that. asked: operations that were timed.
    """

    name = "a calculator"

    def __init__(
        self,
        operations: Callable[[Operation], float] | None = None,
        *,
        fixed: float = 0.0,
        saves: float = 1.0,
        constant: float | None = None,
    ) -> None:
        self.operations = operations or (lambda operation: RATE * macs_of(operation))
        self.fixed, self.saves, self.constant, self.asked = fixed, saves, constant, 0

    def operation(self, operation: Operation) -> float:
        self.asked += 1
        return self.operations(operation)

    def model(self, model: nn.Module, calls: Any) -> float:
        return self.models([model], calls)[0]

    def models(self, models: Sequence[nn.Module], calls: Any) -> list[float]:
        if self.constant is not None:
            return [self.constant] * len(models)
        macs = [float(complexity(model).macs) for model in models]
        return [self.fixed + RATE * (macs[0] - self.saves * (macs[0] - m)) for m in macs]
