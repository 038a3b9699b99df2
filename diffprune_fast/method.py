"""The method in one function: trace, rehearse, rotate, score, select, slice, compensate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .choices import CompensationMode, Layouts, NormGroups, Units
from .plan.plan import Plan
from .result import PruneResult
from .scoring.options import ScoreOptions
from .selection.options import SelectOptions
from .stages import Stages, by_function, keywords

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
    scoring, selecting = by_function(options, also=keywords(score_and_prune))
    run = Stages(
        model,
        loader,
        component=component,
        budget={"ratio": ratio, "params": params, "macs": macs, "latency": latency, "memory": memory},
        norm_groups=norm_groups,
        inplace=inplace,
        optimizer=optimizer,
        example_inputs=example_inputs,
        compensate=compensate,
        proof=proof,
        seed=seed,
        scoring=scoring,
        selecting=selecting,
    )
    try:
        if drop_blocks is not None:
            run.drop_blocks(drop_blocks, plan)
        run.trace(plan, units=units, like=like, layout=layout)
        run.rehearse()
        if rotate:
            run.rotate_heads()
        run.score()
        run.select()
        run.slice_and_compensate()
        return run.commit()
    except BaseException:
        run.undo()
        raise
