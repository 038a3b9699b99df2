"""The method in one function: trace, score, select, slice."""

from __future__ import annotations

import difflib
import inspect
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from .depth.shallower import prune_shallower
from .result import PruneResult
from .scoring import score
from .selection import select
from .slicing import dry_run, prune
from .tracing import Plan, trace


def score_and_prune(
    model: nn.Module,
    loader: Iterable[Any] | None,
    *,
    ratio: float | None = None,
    params: float | None = None,
    macs: float | None = None,
    units: str = "auto",
    norm_groups: str = "count",
    inplace: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
    plan: Plan | None = None,
    drop_blocks: int | str | Sequence[str] | None = None,
    seed: int = 0,
    **options: Any,
) -> PruneResult:
    """Make a trained diffusion model smaller: remove the channels that its loss needs least.

    loader: images as the model is trained on, ``(batch, channels, height, width)`` in [-1, 1]; also
    ``(images, labels)`` pairs or dicts with conditioning inputs. ratio, params, macs: the budget, one of them; nothing
    is ``ratio=0.3``. ``units``: whether dims or whole heads of attentions go, see :func:`trace`. ``inplace=False``
    leaves the model alone and prunes a copy. ``plan``: what :func:`trace` gave, if it is there already.
    ``drop_blocks``: whole residual blocks go first, so many of those that cost least, or the ones named (see
    :func:`drop_blocks`); a share asked of params or macs is one of the whole model. Further options are those of
    :func:`score` (``scheduler``, ``estimator``, ``threshold``, …) and of :func:`select` (``ranking``,
    ``round_to``, ``ignore``, …).

    The budget and the slicing are rehearsed before the scores are computed, and nothing of the model changes before
    everything is checked: if this raises, the model is as it was.

    Raises:
        TypeError: an option that doesn't exist. ValueError: a wrong value, a budget that can't be met, a loader that
        doesn't fit the model. TraceError, SliceError: the model can't be followed or sliced.

    Source: Fang, Ma, Wang: Structural Pruning for Diffusion Models (NeurIPS 2023, arXiv 2305.10924).
    """
    scoring, selecting = _sorted_out(options)
    budget: dict[str, Any] = {"ratio": ratio, "params": params, "macs": macs}
    if drop_blocks is not None:
        if plan is not None:
            raise ValueError("drop_blocks changes what goes together: leave out plan, it is traced without the blocks")
        return prune_shallower(
            score_and_prune,
            model,
            loader,
            drop_blocks,
            budget=budget,
            inplace=inplace,
            optimizer=optimizer,
            example_inputs=example_inputs,
            seed=seed,
            options={**options, "units": units, "norm_groups": norm_groups},
        )
    started = time.perf_counter()

    if plan is None:
        plan = trace(model, example_inputs, units=units)
    traced = time.perf_counter()

    rehearsal = select(plan, np.arange(plan.n_units) % 97 + 1.0, **budget, norm_groups=norm_groups, **selecting)
    dry_run(model, plan, rehearsal.keep, norm_groups=norm_groups, example_inputs=example_inputs)
    rehearsed = time.perf_counter()

    scores = score(model, loader, plan, seed=seed, **scoring)
    scored = time.perf_counter()

    selection = select(plan, scores, **budget, norm_groups=norm_groups, **selecting)
    selected = time.perf_counter()

    result = prune(
        model,
        plan,
        selection.keep,
        norm_groups=norm_groups,
        inplace=inplace,
        optimizer=optimizer,
        example_inputs=example_inputs,
        backend=scoring.get("backend", "auto"),
    )
    result.scores, result.selection, result.seed = scores, selection, seed
    result.seconds = {
        "trace": traced - started,
        "rehearse": rehearsed - traced,
        "score": scored - rehearsed,
        "select": selected - scored,
        **result.seconds,
    }
    return result


def _sorted_out(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options by the function that takes them; an unknown name is an error that offers the nearest one."""
    of_score, of_select = (_keywords(f) for f in (score, select))
    known = of_score | of_select | _keywords(score_and_prune)
    for name in options:
        if name not in of_score | of_select:
            near = difflib.get_close_matches(name, known, 1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"unknown option {name!r}{hint} (budgets are ratio, params and macs)")
    return (
        {n: v for n, v in options.items() if n in of_score},
        {n: v for n, v in options.items() if n in of_select},
    )


def _keywords(f: Any) -> set[str]:
    return {p.name for p in inspect.signature(f).parameters.values() if p.kind is p.KEYWORD_ONLY}
