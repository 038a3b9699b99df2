"""The method in one function: trace, score, select, slice, compensate."""

from __future__ import annotations

import difflib
import inspect
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import compensation
from .architectures.inputs import knows_inputs
from .choices import CompensationMode, NormGroups, Units
from .depth.shallower import Budget, shallower
from .objective.batches import replayed
from .objective.calls import first_call
from .pipelines.encoding import example_call
from .pipelines.target import Target, are_prompts, find_target, own_loader
from .plan.keep_sets import sliced_shapes
from .plan.plan import Keep, Plan
from .result import PruneResult, record
from .rotation.rotate import rotated
from .scoring.criteria import CRITERIA
from .scoring.options import ScoreOptions
from .scoring.score import score
from .scoring.scores import rehearsed_scores
from .selection.options import SelectOptions
from .selection.select import select
from .slicing.optimizers import check_optimizer
from .slicing.prune import dry_run, prune
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
        ratio, params, macs: the budget, one of them; nothing is ``ratio=0.3``.
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
        TypeError: an option that doesn't exist. ValueError: a wrong value, a budget that can't be met, a loader that
        doesn't fit the model. TraceError, SliceError: the model can't be followed or sliced.

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
    budget: Budget = {"ratio": ratio, "params": params, "macs": macs}
    if drop_blocks is not None and plan is not None:
        raise ValueError("drop_blocks changes what goes together: leave out plan, it is traced without the blocks")
    progress = scoring.get("progress", True)
    own = None
    if are_prompts(loader) or (loader is None and _needs_data(scoring, compensate)):
        loader = own = own_loader(model, loader, scheduler=scoring.get("scheduler"), seed=seed, progress=progress)
    target = find_target(model, component, loader, options)
    check_optimizer(target.model, optimizer, inplace)
    scoring["scheduler"] = target.scheduler
    training = {"seed": seed, "scheduler": target.scheduler, "loss_fn": scoring.get("loss_fn")}
    example_inputs, loader = _inputs(target, example_inputs, training)
    loader = None if loader is None else replayed(loader)

    backend = scoring.get("backend", "auto")
    laps = _Laps()
    with shallower(
        target.model,
        drop_blocks,
        loader,
        budget,
        inplace=inplace,
        optimizer=optimizer,
        example_inputs=example_inputs,
        options={**scoring, "seed": seed},
    ) as shallow:
        dense, budget, inplace = shallow.model, shallow.budget, inplace or shallow.is_copy
        laps.end("blocks" if drop_blocks is not None else None)

        plan = plan or trace(dense, example_inputs, units=units)
        laps.end("trace")

        rehearsal = select(plan, rehearsed_scores(plan), **budget, norm_groups=norm_groups, **selecting)
        sliced = dry_run(dense, plan, rehearsal.keep, norm_groups=norm_groups, example_inputs=example_inputs)
        check_optimizer(dense, optimizer, inplace, {name for name, _ in sliced.kept})
        laps.end("rehearse")

        seen = loader if rotate and optimizer is None else None
        with rotated(dense, plan, seen, stays=inplace, **training) as rotation:
            laps.end("rotate" if seen is not None else None)

            scoring.setdefault("damage", rehearsal.allocation == "gauss-newton")  # nobody else would look at it
            scores = score(dense, loader, plan, seed=seed, **scoring)
            laps.end("score")

            selection = select(plan, scores, **budget, norm_groups=norm_groups, **selecting)
            laps.end("select")

            result = _slice(
                dense,
                plan,
                selection.keep,
                None if compensate is False else loader,
                inplace=inplace,
                optimizer=optimizer,
                slicing={
                    "norm_groups": norm_groups,
                    "example_inputs": example_inputs,
                    "backend": backend,
                    "proof": proof,
                },
                solving={
                    "mode": "auto" if compensate is True else compensate,
                    "autocast": scoring.get("autocast"),
                    "progress": progress,
                    **training,
                },
            )
    result = record(
        result,
        own_samples=0 if own is None else own.n,
        scores=scores,
        selection=selection,
        rotation=rotation,
        seed=seed,
        seconds={**laps.seconds, **result.seconds},
    )
    return target.put_back(shallow.tell(result))


def _slice(
    dense: nn.Module,
    plan: Plan,
    keep: Keep,
    loader: Iterable[Any] | None,
    *,
    inplace: bool,
    optimizer: torch.optim.Optimizer | None,
    slicing: Mapping[str, Any],
    solving: Mapping[str, Any],
) -> PruneResult:
    """Slice and, with a loader, compensate: on a copy, so that the model isn't touched before all is known to work."""
    if loader is None:
        return prune(dense, plan, keep, inplace=inplace, optimizer=optimizer, **slicing)
    trial = prune(dense, plan, keep, inplace=False, **slicing)
    kept = sliced_shapes(dense, plan, keep).kept
    found = compensation.compensate(trial.model, dense, loader, kept=kept, **solving)
    seconds = {**trial.seconds, "compensate": found.seconds}
    if not inplace:
        return record(trial, compensation=found, seconds=seconds)
    result = prune(dense, plan, keep, inplace=True, optimizer=optimizer, **{**slicing, "proof": False})
    for mine, solved in zip(result.model.parameters(), trial.model.parameters(), strict=True):
        mine.data.copy_(solved.data)
    return record(result, compensation=found, proof=trial.proof, seconds=seconds)


def _needs_data(scoring: Mapping[str, Any], compensate: CompensationMode | bool) -> bool:
    """Whether without a loader the model has to make images itself: a loss of one's own needs one's own batches."""
    asked = compensate not in (False, "auto")
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
            raise TypeError(f"unknown option {name!r}{hint} (budgets are ratio, params and macs)")
    return (
        {n: v for n, v in options.items() if n in of_score},
        {n: v for n, v in options.items() if n in of_select},
    )


def _keywords(f: Any) -> set[str]:
    return {p.name for p in inspect.signature(f).parameters.values() if p.kind is p.KEYWORD_ONLY}
