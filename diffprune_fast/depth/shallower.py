"""Depth before width: blocks go first, then channels of what is left, and nothing has changed if either fails."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..result import Complexity, PruneResult
from ..selection.budgets import parse_budget
from ..tracing.inputs import calls_of
from .blocks import Block, complexity_of, find_blocks
from .dropping import forget, named, without
from .scoring import BlockScores, score_blocks


def prune_shallower(
    prune_channels: Callable[..., PruneResult],
    blocks: int | str | Sequence[str],
    model: nn.Module,
    loader: Iterable[Any] | None,
    *,
    budget: Mapping[str, float | None],
    inplace: bool,
    optimizer: torch.optim.Optimizer | None,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None,
    seed: int,
    options: Mapping[str, Any],
    **settings: Any,
) -> PruneResult:
    """Drop ``blocks`` (so many of the cheapest, or names), then let ``prune_channels`` prune what is left.

    Everything after ``blocks`` is as ``prune_channels`` takes it. Raises what it raises, DepthError for names that are
    no blocks, ValueError for a number that can't be had.
    """
    parse_budget(budget)
    if not inplace:
        model = copy.deepcopy(model)
    begin = time.perf_counter()
    chosen, scores = _chosen(model, loader, blocks, example_inputs, {"seed": seed, **options})
    before = complexity_of(model, calls_of(model, example_inputs))
    old = list(model.parameters())
    with without(model, chosen, example_inputs):
        shallow = time.perf_counter() - begin
        result = prune_channels(
            model,
            loader,
            budget=_of_whole(budget, before),
            inplace=True,
            optimizer=optimizer,
            example_inputs=example_inputs,
            seed=seed,
            options=options,
            **settings,
        )
    if optimizer is not None:
        forget(optimizer, old, model)
    result.before, result.blocks, result.dropped = before, scores, tuple(b.name for b in chosen)
    result.seconds = {"blocks": shallow, **result.seconds}
    return result


def _chosen(
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
    if loader is not None and iter(loader) is loader:
        raise ValueError("blocks and channels are scored one after the other: give a loader that starts anew, or names")
    taken = inspect.signature(score_blocks).parameters
    given = {n: v for n, v in options.items() if n in taken and v is not None}
    samples = min(taken["samples"].default, options.get("max_samples") or taken["samples"].default)
    scores = score_blocks(model, loader, example_inputs=example_inputs, samples=samples, **given)
    return scores.cheapest(asked), scores


def _of_whole(budget: Mapping[str, float | None], before: Complexity) -> dict[str, float | None]:
    """Shares of params and macs as numbers: what they are shares of is the model with all its blocks."""
    whole = {"params": before.params, "macs": before.macs}
    return {n: max(2, int(v * whole[n])) if n in whole and v is not None and v < 1 else v for n, v in budget.items()}
