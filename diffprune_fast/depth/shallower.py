"""Depth before width: blocks go first, then channels of what is left, and nothing has changed if either fails."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..architectures.inputs import calls_of
from ..ops.slice_channels import Step
from ..plan.blocks import Block
from ..plan.plan import Complexity
from ..pruned.held_tensors import copied
from ..scoring.scores import BlockScores
from ..selection.budgets import parse_budgets
from ..slicing.optimizers import forgetting
from .drop_blocks import named, put_back_steps, take_out
from .find_blocks import complexity_of, find_blocks
from .score_blocks import score_blocks

Budget = Mapping[str, Any]


@dataclass(frozen=True)
class Shallower:
    """A model without some of its residual blocks.

    model: the one to go on with; is_copy: it isn't the one that was given. budget: what is left of the budget that was
    asked of the whole model. before: what that cost. dropped: names. scores: what each block would have cost, where a
    number was asked for. finish: the calls after which the blocks are gone for good.
    """

    model: nn.Module
    budget: Budget
    is_copy: bool
    before: Complexity
    dropped: tuple[str, ...]
    scores: BlockScores | None
    finish: tuple[Step, ...]

    def told(self) -> dict[str, Any]:
        """The fields of a result that say which blocks went."""
        return {"before": self.before, "dropped": self.dropped, "blocks": self.scores}


def shallower(
    model: nn.Module,
    blocks: int | str | Sequence[str],
    loader: Iterable[Any] | None,
    budget: Budget,
    back: list[Step],
    *,
    inplace: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Shallower:
    """Drop ``blocks``: so many of the cheapest, or names.

    back: gets the calls that put them back, before the first one goes. loader and options (``seed``, ``scheduler``, …)
    are for scoring the blocks, where a number is asked for. optimizer: the dropped parameters are to be taken out of it
    at the end.

    Raises DepthError for names that are no blocks, ValueError for a number that can't be had.
    """
    parse_budgets(budget)
    whole = model if inplace else copied(model)
    chosen, scores = _choose(whole, loader, blocks, example_inputs, options or {})
    before = complexity_of(whole, calls_of(whole, example_inputs))
    old = list(whole.parameters())
    back[:0] = put_back_steps(whole)
    take_out(whole, chosen, example_inputs)
    names = tuple(block.name for block in chosen)
    finish = () if optimizer is None else tuple(forgetting(optimizer, old, whole))
    return Shallower(whole, _of_whole(budget, before), not inplace, before, names, scores, finish)


def _choose(
    model: nn.Module,
    loader: Any,
    asked: int | str | Sequence[str],
    example_inputs: Any,
    options: Mapping[str, Any],
) -> tuple[list[Block], BlockScores | None]:
    if isinstance(asked, bool) or not isinstance(asked, (int, str, list, tuple)):
        raise TypeError(f"drop_blocks is a number of blocks, a name or a list of names, not {asked!r}")
    if not isinstance(asked, int):
        return named(find_blocks(model, example_inputs), [asked] if isinstance(asked, str) else asked), None
    taken = inspect.signature(score_blocks).parameters
    given = {n: v for n, v in options.items() if n in taken and v is not None}
    samples = min(taken["samples"].default, options.get("max_samples") or taken["samples"].default)
    scores = score_blocks(model, loader, example_inputs=example_inputs, samples=samples, **given)
    return scores.cheapest(asked), scores


def _of_whole(budget: Budget, before: Complexity) -> dict[str, float | None]:
    """Shares of params and macs as numbers: what they are shares of is the model with all its blocks."""
    whole = {"params": before.params, "macs": before.macs}
    return {n: max(2, int(v * whole[n])) if n in whole and v is not None and v < 1 else v for n, v in budget.items()}
