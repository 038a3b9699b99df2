"""What is asked of a pruned model, a budget or a config, behind one set of functions that the method calls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from ..architectures.configs import shapes_of
from ..choices import Units
from ..ops.slice_channels import Step
from ..plan.keep_sets import Sliced
from ..plan.plan import Complexity, Plan
from ..result import PruneResult, record
from ..scoring.scores import Scores
from ..selection.budgets import BudgetError
from ..selection.select import Selection, select
from .conform import check_settings, conform, conforming_steps, replaced_places
from .counts import counts_for
from .sinusoids import frequencies
from .target import Target, read_like, target_of


class Wish:
    """A budget: the widths are whatever costs least.

    options: those of :func:`select`, with the budget among them.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options

    is_of_widths = True  # slicing alone fulfils it

    def units(self, asked: Units) -> Units:
        """What can go of attentions, where ``asked`` leaves it open."""
        return asked

    def select(self, plan: Plan, scores: Scores | np.ndarray) -> Selection:
        return select(plan, scores, **self.options)

    def check(self, model: nn.Module, sliced: Sliced) -> None:
        """Whether the sliced model will be what is wished for, before anything changes."""

    def fulfil(self, result: PruneResult) -> PruneResult:
        """The result with what a wish means beside widths. The model is changed in place."""
        return result

    def finishing(self, model: nn.Module, fulfilled: nn.Module, sliced: Sliced) -> list[Step]:
        """The calls that give ``model``, sliced and with the parameters of ``fulfilled``, the rest of what that has."""
        return []


class Like(Wish):
    """A config: every width is given, the best units of every group stay."""

    is_of_widths = False

    def __init__(self, model: nn.Module, like: Any, steps: int, **options: Any) -> None:
        super().__init__(**options)
        self.model, self.steps = model, steps
        updates = read_like(model, like)
        target_of(model, updates)  # before anything is worked out of it
        self.target: Target = target_of(model, {**updates, **frequencies(model, updates, steps)})

    def units(self, asked: Units) -> Units:
        return self.target.units if asked == "auto" else asked

    def select(self, plan: Plan, scores: Scores | np.ndarray) -> Selection:
        wanted, replaced = shapes_of(self.target.fresh), replaced_places(self.model, self.target)
        try:
            found = select(plan, scores, counts=counts_for(plan, wanted, replaced), **self.options)
        except BudgetError as e:
            raise BudgetError(f"like={self.target} can't be reached: {e}") from None
        return replace(found, asked=f"like {self.target}", met=f"every width of that {type(self.model).__name__}")

    def check(self, model: nn.Module, sliced: Sliced) -> None:
        check_settings(model, sliced, self.target)

    def fulfil(self, result: PruneResult) -> PruneResult:
        fewer = conform(result.model, self.target, self.steps)
        after = Complexity(result.after.params - fewer, result.after.macs - fewer)
        shapes = {name: tuple(t.shape) for name, t in [*result.model.named_parameters(), *result.model.named_buffers()]}
        return record(result, after=after, shapes={n: shapes[n] for n in result.shapes})

    def finishing(self, model: nn.Module, fulfilled: nn.Module, sliced: Sliced) -> list[Step]:
        return conforming_steps(model, fulfilled, sliced, self.target)
