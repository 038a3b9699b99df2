"""The method in one function: trace, score, select, slice."""

from __future__ import annotations

import difflib
import inspect
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from .depth.shallower import prune_shallower
from .pipelines import example_call, is_pipeline, opened
from .result import PruneResult
from .scoring import first_call, score
from .scoring.scores import rehearsed_scores
from .selection import select
from .slicing import check_optimizer, dry_run, prune
from .tracing import Plan, trace
from .tracing.inputs import knows_inputs


def score_and_prune(
    model: Any,
    loader: Iterable[Any] | None,
    *,
    component: str | None = None,
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

    model: a module (inside ``torch.compile`` the one in there, which is ``result.model``), or a diffusers pipeline, of
    which ``component`` is pruned (None: the denoiser). loader: images as
    the model is trained on, ``(batch, channels, height, width)`` in [-1, 1]; also ``(images, labels)`` pairs or dicts
    with conditioning inputs; for a pipeline images and captions, see :func:`~diffprune_fast.pipelines.encoded`.
    ratio, params, macs: the budget, one of them; nothing is ``ratio=0.3``. units: whether dims or whole heads of
    attentions go, see :func:`trace`. ``inplace=False`` leaves the model alone and prunes a copy. example_inputs: as in
    :func:`trace`; where a class isn't known the loader's first batch serves, or the pipeline's own call. plan: what
    :func:`trace` gave, if it is there already. drop_blocks: whole residual blocks go first, so many of those that cost
    least, or the ones named (see :func:`drop_blocks`); a share asked of params or macs is one of the whole model.
    Further options are those of :func:`score` (``scheduler``, ``estimator``, ``threshold``, …) and of :func:`select`
    (``ranking``, ``round_to``, ``ignore``, …).

    The budget and the slicing are rehearsed before the scores are computed, and nothing of the model changes before
    everything is checked: if this raises, the model is as it was.

    Raises:
        TypeError: an option that doesn't exist. ValueError: a wrong value, a budget that can't be met, a loader that
        doesn't fit the model. TraceError, SliceError: the model can't be followed or sliced.

    Source: Fang, Ma, Wang: Structural Pruning for Diffusion Models (NeurIPS 2023, arXiv 2305.10924).
    """
    _sorted_out(options)  # an unknown name fails before anything else
    pipe = model
    model, loader, options, put_back = opened(model, component, loader, options)
    check_optimizer(model, optimizer, inplace)
    if example_inputs is None and not knows_inputs(model):
        if loader is not None:
            how = {name: options.get(name) for name in ("scheduler", "loss_fn")}
            example_inputs, loader = first_call(model, loader, seed=seed, **how)
        elif is_pipeline(pipe):
            example_inputs = example_call(pipe, component)
    if drop_blocks is not None and plan is not None:
        raise ValueError("drop_blocks changes what goes together: leave out plan, it is traced without the blocks")

    prune_model = prune_channels if drop_blocks is None else partial(prune_shallower, prune_channels, drop_blocks)
    result = prune_model(
        model,
        loader,
        budget={"ratio": ratio, "params": params, "macs": macs},
        units=units,
        norm_groups=norm_groups,
        inplace=inplace,
        optimizer=optimizer,
        example_inputs=example_inputs,
        plan=plan,
        seed=seed,
        options=options,
    )
    return put_back(result)


def prune_channels(
    model: nn.Module,
    loader: Iterable[Any] | None,
    *,
    budget: Mapping[str, Any],
    units: str,
    norm_groups: str,
    inplace: bool,
    optimizer: torch.optim.Optimizer | None,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None,
    plan: Plan | None,
    seed: int,
    options: Mapping[str, Any],
) -> PruneResult:
    """The method: trace, score, select, slice. Arguments and errors are those of :func:`score_and_prune`."""
    scoring, selecting = _sorted_out(options)
    started = time.perf_counter()

    if plan is None:
        plan = trace(model, example_inputs, units=units)
    traced = time.perf_counter()

    rehearsal = select(plan, rehearsed_scores(plan), **budget, norm_groups=norm_groups, **selecting)
    sliced = dry_run(model, plan, rehearsal.keep, norm_groups=norm_groups, example_inputs=example_inputs)
    check_optimizer(model, optimizer, inplace, {name for name, _ in sliced.kept})
    rehearsed = time.perf_counter()

    scoring.setdefault("damage", rehearsal.allocation == "gauss-newton")  # nobody else would look at it
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


def _sorted_out(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
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
