"""The method in one function: trace, score, select, slice, compensate."""

from __future__ import annotations

import difflib
import inspect
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import compensation
from .architectures.inputs import knows_inputs
from .choices import CompensationMode, Layouts, NormGroups, Units
from .depth.shallower import Budget, shallower
from .footprint.promise import Promise
from .objective.batches import replayed
from .objective.calls import first_call
from .pipelines.encoding import example_call
from .pipelines.target import Target, are_prompts, find_target, own_loader
from .plain.wish import Wish
from .plain.wishes import wish_for
from .plan.keep_sets import sliced_shapes
from .plan.plan import Keep, Plan
from .promises import costs_of, keep_promises, measurable
from .pruned.record import record_of
from .result import PruneResult
from .rotation.rotate import rotate_heads
from .scoring.criteria import CRITERIA
from .scoring.options import ScoreOptions
from .scoring.score import score
from .scoring.scores import Scores, rehearsed_scores
from .selection.budgets import Budget as Asked
from .selection.costs import Cost
from .selection.options import SelectOptions
from .selection.select import Selection, select
from .sensitivity.measure import measure_sensitivities
from .slicing.commit import Change, gradients_as_now, undo
from .slicing.optimizers import check_optimizer
from .slicing.prune import checked, dry_run, prepared, prune
from .tracing.trace import trace

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Options(ScoreOptions, SelectOptions, total=False):
    """What :func:`score_and_prune` hands on to :func:`score` and :func:`select`."""


def score_and_prune(
    model: Any,
    loader: Iterable[Any] | None,
    *,
    component: str | None = None,
    ratio: float | None = None,
    params: float | None = None,
    macs: float | None = None,
    latency: float | None = None,
    memory: float | None = None,
    like: Any = None,
    layout: Layouts = "free",
    units: Units = "auto",
    norm_groups: NormGroups = "count",
    inplace: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
    plan: Plan | None = None,
    drop_blocks: int | str | Sequence[str] | None = None,
    rotate: bool = True,
    compensate: CompensationMode | bool = "auto",
    proof: bool = True,
    seed: int = 0,
    **options: Unpack[Options],
) -> PruneResult:
    """Make a trained diffusion model smaller: remove the channels that its loss needs least.

    The budget and the slicing are rehearsed before the scores are computed, and nothing of the model changes before
    everything is checked: if this raises, the model is as it was.

    Args:
        model: a module (inside ``torch.compile`` the one in there, which is ``result.model``), or a diffusers pipeline,
            of which one component is pruned.
        loader: images as the model is trained on, ``(batch, channels, height, width)`` in [-1, 1]; also ``(images,
            labels)`` pairs or dicts with conditioning inputs; for a pipeline images and captions, see
            :func:`~diffprune_fast.pipelines.encoded`. Without data: a list of prompts with a pipeline, or None with a
            model that makes images of noise or of classes; then it makes 512 images itself, and the result says so.
            None costs nothing where the criterion needs no data ("magnitude", "random").
        component: the name of that component; None is the denoiser.
        ratio, params, macs: the budget, as for :func:`select`; nothing is ``ratio=0.3``. All but ratio can be combined.
        latency: the share of the dense model's time that stays, on its device, for a forward of ``example_inputs``:
            their batch size counts. Operations are measured one by one, at several widths, and kept in
            ``~/.cache/diffprune_fast`` (see :func:`~diffprune_fast.footprint.measure_times`); the widths that are
            chosen are timed, and chosen anew where that is off. ``result.promises`` says what came of it.
        memory: the same of the peak memory: parameters, buffers, and the activations that live at a time (see
            :func:`~diffprune_fast.footprint.count_memory`); or a number of bytes.
        like: in place of a budget a smaller config of the model's class: some of its keys, a whole one, or the path of
            one. Every width becomes that config's, and the result is a plain model of the class; see
            :mod:`~diffprune_fast.plain`.
        layout: ``"config"``: the best widths under the budget that a config of the class has; such a plain model again.
        units: whether dims or whole heads of attentions go, see :func:`trace`.
        norm_groups: ``"exact"`` keeps the membership of norm groups, ``"count"`` only their divisibility.
        inplace: False leaves the model alone and prunes a copy.
        optimizer: of the model's parameters; its state is sliced with them.
        example_inputs: as in :func:`trace`; where a class isn't known the loader's first batch serves, or the
            pipeline's own call.
        plan: what :func:`trace` gave, if it is there already.
        drop_blocks: whole residual blocks go first, so many of those that cost least, or the ones named (see
            :func:`drop_blocks`); a share asked of params or macs is one of the whole model.
        rotate: with a loader (and no optimizer, whose state would be of another basis), attention heads get another
            basis first, in which their least needed directions are single dims; the model computes the same. See
            :func:`~diffprune_fast.rotation.rotate_heads`.
        compensate: with a loader, the layers that lost inputs are solved anew so that they answer as the dense model's
            do; False leaves them as sliced. See :func:`~diffprune_fast.compensation.compensate` for the modes.
        proof: one real forward shows that slicing removes the channels and nothing else, see :func:`prune`.
        seed: the same one gives the same keep-sets.
        options: those of :func:`score` (``scheduler``, ``estimator``, ``threshold``, …) and of :func:`select`
            (``ranking``, ``round_to``, ``ignore``, …).

    Returns:
        The pruned model with its plan, its keep-sets and its figures.

    Raises:
        TypeError: an option that doesn't exist.
        ValueError: a wrong value, a budget that can't be met, a loader that doesn't fit the model.
        TraceError, SliceError: the model can't be followed or sliced.

    Example:
        >>> import torch
        >>> from diffusers import UNet2DModel
        >>> unet = UNet2DModel(8, block_out_channels=(8, 16), down_block_types=("DownBlock2D",) * 2,
        ...                    up_block_types=("UpBlock2D",) * 2, norm_num_groups=4)
        >>> result = score_and_prune(unet, [torch.rand(16, 3, 8, 8) * 2 - 1], macs=0.6, round_to=4, max_samples=32,
        ...                          progress=False)
        >>> result.after.macs < 0.6 * result.before.macs
        True
        >>> unet(torch.zeros(1, 3, 8, 8), 5).sample.shape
        torch.Size([1, 3, 8, 8])

    Source: Fang, Ma, Wang: Structural Pruning for Diffusion Models (NeurIPS 2023, arXiv 2305.10924).
    """
    scoring, selecting = _by_stage(options)
    budget: Budget = {"ratio": ratio, "params": params, "macs": macs, "latency": latency, "memory": memory}
    promised = measurable(budget)
    if drop_blocks is not None and (plan is not None or promised):
        raise ValueError(
            "drop_blocks changes what goes together: leave out plan, it is traced without the blocks"
            if plan is not None
            else "latency and memory are counted of the model as it is: call drop_blocks first, then prune what is left"
        )
    progress = scoring.get("progress", True)
    own = None
    tries = selecting.get("allocation") == "measured"
    if are_prompts(loader) or (loader is None and _needs_data(scoring, tries or compensate not in (False, "auto"))):
        loader = own = own_loader(model, loader, scheduler=scoring.get("scheduler"), seed=seed, progress=progress)
    target = find_target(model, component, loader, options)
    check_optimizer(target.model, optimizer, inplace)
    scoring["scheduler"] = target.scheduler
    training = {"seed": seed, "scheduler": target.scheduler, "loss_fn": scoring.get("loss_fn")}
    example_inputs, loader = _inputs(target, example_inputs, training)
    loader = None if loader is None else replayed(loader)

    slicing = {
        "norm_groups": norm_groups,
        "example_inputs": example_inputs,
        "backend": scoring.get("backend", "auto"),
        "proof": proof,
    }
    laps = _Laps()
    back = gradients_as_now()  # what gives everything back as it was, until the commit begins
    try:
        shallow = shallower(
            target.model,
            drop_blocks,
            loader,
            budget,
            back,
            inplace=inplace,
            optimizer=optimizer,
            example_inputs=example_inputs,
            options={**scoring, "seed": seed},
        )
        dense, budget, inplace = shallow.model, shallow.budget, inplace or shallow.is_copy
        laps.end("blocks" if drop_blocks is not None else None)

        wish = wish_for(
            dense,
            like=like,
            layout=layout,
            budget=budget,
            norm_groups=norm_groups,
            steps=_steps(target),
            optimizer=optimizer,
            options=selecting,
        )
        plan = plan or trace(dense, example_inputs, units=wish.units(units))
        laps.end("trace")

        costs = {**selecting.get("costs", {})}
        if promised:
            costs = costs_of(dense, plan, promised, costs, selecting.get("round_to", 8), **slicing)
            wish.options["costs"] = costs
            laps.end("measure costs")

        rehearsal = wish.select(plan, rehearsed_scores(plan))
        sliced = dry_run(dense, plan, rehearsal.keep, norm_groups=norm_groups, example_inputs=example_inputs)
        wish.check(dense, sliced)
        check_optimizer(dense, optimizer, inplace, {name for name, _ in sliced.kept})
        laps.end("rehearse")

        rotation = None
        if rotate and optimizer is None and loader is not None:
            back.insert(0, (rotation := rotate_heads(dense, plan, loader, **training)).undo)
            laps.end("rotate")

        # nobody else would look at it
        scoring.setdefault("damage", rehearsal.allocation in ("gauss-newton", "measured"))
        scores = score(dense, loader, plan, seed=seed, **scoring)
        laps.end("score")
        if tries:
            scores = _tried(dense, loader, plan, scores, seed, norm_groups, scoring, selecting)
            laps.end("measure")

        selection, promises = _chosen(dense, plan, wish, scores, promised, costs, slicing)
        laps.end("select")

        change = _change(
            dense,
            plan,
            selection.keep,
            None if compensate is False else loader,
            wish=wish,
            inplace=inplace,
            optimizer=optimizer,
            slicing=slicing,
            solving={
                "mode": "auto" if compensate is True else compensate,
                "autocast": scoring.get("autocast"),
                "progress": progress,
                **training,
            },
        )
        turned = [] if rotation is None else [rotation.forget if inplace else rotation.undo]
        change = change.and_then(
            [*turned, *shallow.finish],
            own_samples=0 if own is None else own.n,
            scores=scores,
            selection=selection,
            promises=promises,
            rotation=rotation,
            seed=seed,
            seconds={**laps.seconds, **change.result.seconds},
            **shallow.told(),
            **target.place_of(change.result.model),
        )
        return change.made([back.clear])
    except BaseException:
        undo(back)
        raise


def _change(
    dense: nn.Module,
    plan: Plan,
    keep: Keep,
    loader: Iterable[Any] | None,
    *,
    wish: Wish,
    inplace: bool,
    optimizer: torch.optim.Optimizer | None,
    slicing: Mapping[str, Any],
    solving: Mapping[str, Any],
) -> Change:
    """What slices and, with a loader, compensates: solved on a copy, whose weights the model then takes over."""
    if loader is None and wish.is_of_widths:
        return checked(dense, plan, keep, inplace=inplace, optimizer=optimizer, **slicing)
    trial = wish.fulfil(prune(dense, plan, keep, inplace=False, **slicing))
    sliced = sliced_shapes(dense, plan, keep)
    found, seconds = None, trial.seconds
    if loader is not None:
        found = compensation.compensate(trial.model, dense, loader, kept=sliced.kept, **solving)
        seconds = {**seconds, "compensate": found.seconds}
    if not inplace:
        return Change(replace(trial, compensation=found, seconds=seconds), (), record_of(trial.model))
    solved = {name: p.data for name, p in trial.model.named_parameters()}
    taking: dict[str, Any] = {"solved": solved, "seconds": seconds}
    change = prepared(dense, plan, sliced, slicing["norm_groups"], optimizer, slicing["backend"], **taking)
    further = wish.finishing(dense, trial.model, sliced)
    return change.and_then(further, compensation=found, proof=trial.proof, after=trial.after, shapes=trial.shapes)


def _chosen(
    dense: nn.Module,
    plan: Plan,
    wish: Wish,
    scores: Scores,
    promised: Sequence[Asked],
    costs: Mapping[str, Cost],
    slicing: Mapping[str, Any],
) -> tuple[Selection, tuple[Promise, ...]]:
    """The units that stay; where the budget can be measured, such that what is measured meets it."""
    if not promised:
        return wish.select(plan, scores), ()

    def choose(now: Mapping[str, Cost]) -> Selection:
        wish.options["costs"] = {**costs, **now}
        return wish.select(plan, scores)

    return keep_promises(dense, plan, promised, costs, choose, **slicing)


def _steps(target: Target) -> int:
    """How many timesteps the model was trained with."""
    return int(getattr(getattr(target.scheduler, "config", None), "num_train_timesteps", None) or 1000)


def _tried(
    dense: nn.Module,
    loader: Iterable[Any] | None,
    plan: Plan,
    scores: Scores,
    seed: int,
    norm_groups: NormGroups,
    scoring: Mapping[str, Any],
    selecting: Mapping[str, Any],
) -> Scores:
    """The scores with what every cluster costs when it is pruned alone."""
    known = _keywords(measure_sensitivities)
    options = {name: value for name, value in {**scoring, **selecting}.items() if name in known}
    return measure_sensitivities(dense, loader, plan, scores, seed=seed, norm_groups=norm_groups, **options)


def _needs_data(scoring: Mapping[str, Any], asked: bool) -> bool:
    """Whether without a loader the model has to make images itself: a loss of one's own needs one's own batches.

    asked: for something that needs them, whatever the criterion.
    """
    rule = CRITERIA.get(scoring.get("criterion", "diff-pruning"))
    return scoring.get("loss_fn") is None and (asked or (rule is not None and rule.needs_data))


def _inputs(target: Target, given: Any, training: Mapping[str, Any]) -> tuple[Any, Iterable[Any] | None]:
    """What the model is traced with, and the loader with nothing missing."""
    if given is not None or knows_inputs(target.model):
        return given, target.loader
    if target.loader is not None:
        return first_call(target.model, target.loader, **training)
    return (None if target.pipeline is None else example_call(target.pipeline, target.component)), None


class _Laps:
    """Wall-clock seconds of the stages, one after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begin = time.perf_counter()

    def end(self, stage: str | None) -> None:
        now = time.perf_counter()
        if stage is not None:
            self.seconds[stage] = now - self._begin
        self._begin = now


def _by_stage(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options by the function that takes them; an unknown name is an error that offers the nearest one."""
    of_score, of_select = (_keywords(f) for f in (score, select))
    known = of_score | of_select | _keywords(score_and_prune)
    for name in options:
        if name not in of_score | of_select:
            near = difflib.get_close_matches(name, known, 1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise TypeError(
                f"unknown option {name!r}{hint} (budgets are ratio, params, macs, latency, memory and like)"
            )
    return (
        {n: v for n, v in options.items() if n in of_score},
        {n: v for n, v in options.items() if n in of_select},
    )


def _keywords(f: Any) -> set[str]:
    return {p.name for p in inspect.signature(f).parameters.values() if p.kind is p.KEYWORD_ONLY}
