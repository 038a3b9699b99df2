"""Which channels matter: the diffusion loss's first-order expansion, estimated once and well.

:func:`score` is the way in. ``objectives`` has the training losses, ``accumulate`` the estimators that draw fresh
samples, ``reference`` the reference's loop.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..choices import Autocast, CriterionName, Estimator, VariantName
from ..objective.batches import Batches
from ..objective.checks import check_batch, check_weights
from ..objective.image_range import check_range_by_loss
from ..objective.isolation import stand_ins, unwrapped
from ..objective.loss import LossFunction, make_objective
from ..objective.loss_run import LossRun
from ..objective.nested import moved
from ..objective.randomness import generator_for, own_randomness
from ..objective.ranks import reduced, together
from ..objective.shards import BorrowedShards, borrowed_shards, fsdp_modules, local, shards_of
from ..ops.channel_scores import channel_scores_
from ..plan.plan import Plan
from .checks import AUTOCAST, check_choices, check_numbers, check_plan, check_sharded, check_timesteps
from .criteria import Criterion, Variant, criterion_of
from .estimators import MeanGradient, MicroScores, Work, until_agreed
from .gauss_newton import SAMPLES, estimated_damage
from .reference_loop import reference_scores
from .scores import LossCurve, Scores
from .state import State, settings_of
from .tables import UnitTable, unit_table
from .timesteps import Cell, curve_timesteps, measure_curve, quad_cells

MIN_SAMPLES = 512


# With one noise. Where the curve of a small digits model crosses the threshold (t = 377) scatters by 9 % with 16,
# by 1 % with 64 images; 32 cost about as much as scoring 230 samples.
CURVE_SAMPLES = 32


# The curve's place in the seed's tree; the others are in objective.randomness.
CURVE = 3


@together
def score(
    model: nn.Module,
    loader: Iterable[Any] | None,
    plan: Plan,
    *,
    scheduler: Any = None,
    estimator: Estimator = "micro",
    criterion: CriterionName = "diff-pruning",
    variant: VariantName | None = None,
    threshold: float | None = None,
    micro_batch: int = 32,
    min_samples: int | None = None,
    max_samples: int = 4096,
    agreement: float = 0.90,
    agreement_ratio: float = 0.3,
    loss_fn: LossFunction | None = None,
    seed: int = 0,
    progress: bool = True,
    autocast: Autocast | torch.dtype | None = None,
    timesteps: Sequence[int] | None = None,
    damage: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    backend: str = "auto",
) -> Scores:
    """How much every unit of ``plan`` matters to the diffusion loss. The model is as before when this ends.

    In torch.distributed the ranks share the micro-batches of "micro" and end with the same scores as one process,
    provided that every rank's loader yields the same batches; other estimators run in full on every rank. A model that
    FSDP2 (``fully_shard``) has spread over the ranks is scored from its shards: every rank walks every micro-batch, and
    only scores of units are added up.

    Args:
        model: the model that ``plan`` was traced from; a module, also inside ``torch.compile`` or DDP.
        loader: any iterable of image batches ``(batch, channels, ...)``, ``(images, labels)`` pairs or dicts with
            conditioning inputs; None for the criteria "magnitude" and "random".
        plan: what :func:`trace` gave.
        scheduler: a diffusers scheduler, see :func:`make_objective`; None is ``DDPMScheduler()``, 1000 steps, noise
            prediction.
        estimator: "micro", sum over micro-batches of abs(theta * g), fresh images, noise and timesteps in each; "mean",
            abs(theta * sum g) of the same; "reference", the reference's loop over t = 0, 1, 2, … with the loader's
            first batch and one noise; "reference-quad", the same over quadratically spaced timesteps.
        criterion: the formula from weight and gradient to a score, one of ``CRITERIA``, or the name of another
            package's (entry points ``diffprune_fast.criteria``).
        variant: for the estimators "reference…" one of ``VARIANTS``; None is their loop with the paper's formula.
        threshold: T; timesteps with ``L_t > T * L_max`` count. None is 0.05 ("ldm_exp": 0.1). "taylor" takes all.
        micro_batch: samples of one backward pass.
        min_samples: samples before the first look at the agreement; None is 512, or ``max_samples`` where that is
            less. At least 16 micro-batches are taken if ``max_samples`` allows.
        max_samples: samples at most.
        agreement: scoring stops when the keep-sets of the two halves agree this much (Jaccard) twice running.
        agreement_ratio: the share of units that goes in those keep-sets.
        loss_fn: ``(model, batch, t, noise) -> (batch,) or scalar`` in place of the scheduler's objective.
        seed: the same one gives the same scores.
        progress: False hides the bar.
        autocast: None or "bf16".
        timesteps: exactly these count, with no threshold.
        damage: with a loader, also estimate what the output loses with each unit, which :func:`select` allocates by:
            512 samples more, or ``max_samples`` where that is less, at all timesteps, whatever criterion and estimator.
        checkpoint: a file for the state of the scoring, written every half minute. Where it is there already, scoring
            goes on from it and ends with the same scores, on any number of ranks, as if it had never been stopped; the
            loader is walked again up to there. Only the first rank reads and writes it, loading it runs no code.
            Estimators other than "micro" are kept once they are through.
        backend: "auto", or who computes the scores, see :func:`~diffprune_fast.ops.channel_scores_`.

    Returns:
        One score per unit, ``(plan.n_units,)``, with what they rest on.

    Raises:
        ValueError, TypeError: before anything is touched, for a bad argument, an empty loader, images of the wrong
            channel count, NaN in images or weights, a missing conditioning input, a plan of another model, or a
            checkpoint of another scoring.
        FloatingPointError: a loss or gradient isn't finite; the message names timestep or parameter.

    Example:
        >>> from diffprune_fast import trace
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> plan = trace(model, (torch.zeros(1, 4),))
        >>> scores = score(model, [torch.randn(16, 4)], plan, max_samples=64, progress=False,
        ...                loss_fn=lambda model, batch, t, noise: (model(batch + noise) - noise).square().mean(1))
        >>> scores.values.shape, scores.samples
        ((16,), 64)

    Source: Fang et al., Structural Pruning for Diffusion Models (arXiv 2305.10924), eq. 7.
    """
    begin = time.perf_counter()
    rule = criterion_of(criterion)
    reading = check_choices(estimator, criterion, variant, autocast)
    least = min(MIN_SAMPLES, max_samples) if min_samples is None else min_samples
    check_numbers(threshold, micro_batch, least, max_samples, agreement_ratio)
    model = unwrapped(model)
    parts = shards_of(model)
    table = unit_table(plan)
    check_plan(model, plan, table)
    names = table.parameters
    if parts is not None:
        check_sharded(estimator, rule)
        table = unit_table(plan, parts=parts)
    device = check_weights(model, sharded=parts is not None)
    if not rule.needs_data and (loader is None or not damage):
        values = _without_data(model, plan, table, rule, seed, backend)
        return Scores(values, "none", criterion, seed, seconds=time.perf_counter() - begin)
    objective = make_objective(model, scheduler, loss_fn).on(device)
    asked = None if timesteps is None else check_timesteps(timesteps, objective.n_timesteps)
    limit = (reading.threshold if threshold is None else threshold) if rule.thresholded and asked is None else None
    if loader is None:
        raise ValueError(f"criterion {criterion!r} needs images: give a loader (only magnitude and random need none)")
    with own_randomness(seed, loader), torch.inference_mode(False), torch.enable_grad():
        batches = Batches(loader, lambda batch: check_batch(model, batch, loss_fn), seed)
        check_range_by_loss(model, objective, batches.first)
        about = settings_of(
            objective,
            plan=plan.hash,
            seed=seed,
            estimator=[estimator, criterion, variant, micro_batch, str(AUTOCAST[autocast])],
            threshold=limit if asked is None else asked.tolist(),
            samples=[least, max_samples, agreement, agreement_ratio],
        )
        state = State(checkpoint, about, model, batches.first, device)
        with (stand_ins if parts is None else borrowed_shards)(model, names) as lent:
            shards, parameters = (lent, lent.parameters) if isinstance(lent, BorrowedShards) else (None, lent)
            work = Work(
                model=model,
                plan=plan,
                objective=objective,
                batches=batches,
                parameters=parameters,
                shards=shards,
                parts=parts,
                device=device,
                seed=seed,
                autocast=AUTOCAST[autocast],
                backend=backend,
                progress=progress,
            )
            found: dict[str, Any]
            if not rule.needs_data:
                found = {"values": _without_data(model, plan, table, rule, seed, backend)}
            elif estimator.startswith("reference"):
                found = _reference(work, estimator, reading, rule, variant, limit, asked, state)
            else:
                sizes = {"micro_batch": micro_batch, "min_samples": least, "max_samples": max_samples}
                agreed = {"agreement": agreement, "agreement_ratio": agreement_ratio}
                found = _sampled(work, table, estimator, rule, limit, asked, state, **sizes, **agreed)
            if damage:
                found["damage"] = _damage(work, asked, state, micro_batch, max_samples)
    return Scores(
        estimator=estimator if rule.needs_data else "none",
        criterion=criterion,
        seed=seed,
        agreement_ratio=agreement_ratio,
        variant=variant,
        seconds=time.perf_counter() - begin,
        **found,
    )


def _damage(
    work: Work, asked: np.ndarray | None, state: State, micro_batch: int, max_samples: int
) -> np.ndarray | None:
    """What the output loses with each unit, at all timesteps or those that were asked for."""
    every = np.arange(work.objective.n_timesteps) if asked is None else asked
    samples = min(SAMPLES, max_samples)
    return estimated_damage(work, allowed=every, micro_batch=micro_batch, samples=samples, state=state)


def _sampled(
    work: Work,
    table: UnitTable,
    estimator: str,
    rule: Criterion,
    threshold: float | None,
    asked: np.ndarray | None,
    state: State,
    **limits: Any,
) -> dict[str, Any]:
    curve, allowed = counted_timesteps(work, threshold, state) if asked is None else (None, asked)
    element = rule.element or "abs"
    collector = MicroScores(work, table, element) if estimator == "micro" else MeanGradient(work, table, element)
    limits = {**limits, "split_ranks": estimator == "micro", "state": state}
    values, samples, agreed = until_agreed(work, collector, allowed=allowed, **limits)
    return {"values": values, "samples": samples, "agreement": agreed, "curve": curve}


def _reference(
    work: Work,
    estimator: str,
    reading: Variant,
    rule: Criterion,
    variant: str | None,
    threshold: float | None,
    asked: np.ndarray | None,
    state: State,
) -> dict[str, Any]:
    before = state.so_far("scores")
    if before is not None:
        return _known(before, threshold)
    n = work.objective.n_timesteps
    if asked is not None:
        cells = [Cell(t, t + 1) for t in asked.tolist()]
    else:
        cells = quad_cells(n) if estimator == "reference-quad" else [Cell(t, t + 1) for t in range(n)]
    element = rule.element or "abs"
    if variant is None:
        reading = Variant(element, norms=element)
    values, walk = reference_scores(work, cells, variant=reading, threshold=threshold)
    curve = walk.curve(threshold) if threshold is not None and len(walk.timesteps) > 1 else None
    seen = {} if curve is None else {"at": torch.from_numpy(curve.timesteps), "losses": torch.from_numpy(curve.losses)}
    state.note("scores", now=True, values=torch.from_numpy(values), samples=walk.samples, **seen)
    return {"values": values, "samples": walk.samples, "agreement": None, "curve": curve}


def _known(before: Mapping[str, Any], threshold: float | None) -> dict[str, Any]:
    curve = None
    if "at" in before and threshold is not None:
        curve = LossCurve(before["at"].numpy(), before["losses"].numpy(), threshold)
    return {"values": before["values"].numpy(), "samples": before["samples"], "agreement": None, "curve": curve}


def counted_timesteps(
    work: LossRun, threshold: float | None, state: State | None = None
) -> tuple[LossCurve | None, np.ndarray]:
    """The timesteps with ``L_t > T * L_max``, and the curve that says so; without a threshold all of them, and None."""
    if threshold is None or work.objective.n_timesteps < 2:
        return None, np.arange(work.objective.n_timesteps)
    before = None if state is None else state.so_far("curve")
    if before is None:
        curve = _curve(work, threshold)
    else:
        work.batches.pass_over([CURVE_SAMPLES])
        curve = LossCurve(before["at"].numpy(), before["losses"].numpy(), threshold)
    if state is not None:
        state.note("curve", at=torch.from_numpy(curve.timesteps), losses=torch.from_numpy(curve.losses))
    return curve, curve.kept_timesteps


def _curve(work: LossRun, threshold: float) -> LossCurve:
    """The loss over the timesteps, on a few images."""
    batch = moved(work.batches.take(CURVE_SAMPLES), work.device)
    noise = work.objective.noise(batch, generator_for(work.seed, CURVE, 0))
    with work.precision():
        at = curve_timesteps(work.objective.n_timesteps)
        shared = work.shards is None
        return measure_curve(work.objective, work.model, batch, noise, threshold, at, work.seed, shared=shared)


def _without_data(
    model: nn.Module, plan: Plan, table: UnitTable, rule: Criterion, seed: int, backend: str
) -> np.ndarray:
    if rule.values is not None:
        values = np.asarray(rule.values(model, plan), np.float64)
        if values.shape != (plan.n_units,):
            raise ValueError(f"the criterion gave {values.shape} scores, the plan has {plan.n_units} units")
        return values
    if rule.element is None:
        return np.random.default_rng(seed % 2**63).random(plan.n_units)
    parameters = dict(model.named_parameters())
    device = next(iter(parameters.values())).device
    squares = torch.zeros(plan.n_units, dtype=torch.float64, device=device)
    thetas = [local(parameters[n].detach()) for n in table.names]
    channel_scores_(squares, thetas, None, table.table, criterion=rule.element, backend=backend)
    if fsdp_modules(model):
        reduced(squares)
    return squares.sqrt().cpu().numpy()
