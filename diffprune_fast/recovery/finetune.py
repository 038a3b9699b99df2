"""Train the pruned model on for a while: with the objective that it was trained with, or towards the dense model."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from ..architectures.inputs import knows_inputs
from ..choices import RecoveryLoss
from ..objective.batches import as_loader
from ..objective.calls import first_call
from ..objective.checks import check_batch, check_trainable
from ..objective.forms import as_batch
from ..objective.isolation import in_mode, unwrapped
from ..objective.loss import LossFunction, make_objective
from ..objective.randomness import own_randomness
from ..objective.ranks import meet, rank_and_count, together
from ..objective.shards import fsdp_modules, reshard
from .distillation import StepLoss, find_teacher
from .guard import Guard, can_look_twice
from .losses import step_loss_of
from .position import Position
from .progress import Progress
from .training import Settings, Step, Training

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Finetuned:
    """losses: every step's loss, on its own batch. seconds: wall clock. resumed: steps that were there already.

    before, after: the same loss on 128 samples of the loader, with the same noise, of the model as it came and as it
    ended; None without the guard. helped: False where that isn't lower, and the weights are those of before.
    """

    losses: tuple[float, ...]
    seconds: float
    resumed: int = 0
    before: float | None = None
    after: float | None = None
    helped: bool = True


# Adam's largest rate: the authors'. Towards a teacher too: the digits model at half its MACs, compensated, ended 200
# steps with a held-out loss of .0326 at 2e-4, .0328 at 5e-4 (docs/study.md has shorter trainings, of two models).
LEARNING_RATE = 2e-4


def finetune(
    model: nn.Module,
    loader: Iterable[Any],
    scheduler: Any = None,
    *,
    steps: int,
    lr: float | None = None,
    teacher: nn.Module | str | os.PathLike[str] | None = None,
    teacher_share: float = 1.0,
    loss: RecoveryLoss | StepLoss | None = None,
    warmup: int | None = None,
    schedule: str = "cosine",
    clip: float = 1.0,
    ema: float = 0.9999,
    accumulate: int = 1,
    gradient_checkpointing: bool = False,
    loss_fn: LossFunction | None = None,
    autocast: torch.dtype | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    accelerator: Accelerator | None = None,
    guard: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Finetuned:
    """Finetune ``model`` in place; it ends with the weights' moving average, in the modes that it had.

    Parameters without ``requires_grad`` stay as they are; the global random state too. Timesteps are stratified within
    a batch. Started by ``accelerate launch`` (or torchrun) on several processes, each takes its part of every batch:
    the result is that of one process, up to rounding and dropout. There the model goes to its process's device;
    settings or loaders that differ are found at the start, and a process that raises takes the others along.

    Args:
        model: a denoiser or an autoencoder, pruned or not.
        loader: as for :func:`diffprune_fast.score`, iterated again and again; the same one on all processes.
        scheduler: the one of the training; None is ``DDPMScheduler()``.
        steps: of the optimiser.
        lr: the learning rate of Adam after the warmup; None is 2e-4.
        warmup: steps of linear rise to ``lr``; None is a tenth, at most 500.
        schedule: what follows, by its name in ``diffusers.optimization``.
        clip: the gradient's largest norm.
        ema: largest decay of the average; after k steps it is at most (1 + k) / (10 + k).
        accumulate: batches of each step; their gradients are averaged.
        gradient_checkpointing: compute activations anew in the backward pass in place of keeping them; models of
            diffusers that offer it.
        loss_fn: ``(model, batch, t, noise) -> (batch,) or scalar`` in place of the scheduler's objective.
        autocast: dtype for the forward, such as ``torch.bfloat16``; None is what ``accelerator`` says.
        teacher: the dense model, such as ``score_and_prune(…, inplace=False)`` leaves it, or its folder. The loss is
            then the mean squared distance of the model's answers to the teacher's at the same noisy images, timesteps
            and conditioning. Both run in evaluation mode: no dropout, no dropped labels. The teacher is left as it is,
            on whatever device it is.
        teacher_share: of that distance in the loss; 0.7 adds 0.3 of the objective's own loss.
        loss: None is ``"distillation"`` with a teacher and ``"noise"`` without. ``"mixed"`` is a teacher_share of 0.7;
            ``"features"`` adds the distance of the layers' features, for a model that was pruned from the teacher;
            ``"second-order"`` that of the answers' sensitivities, at twice the forwards. Or a callable
            ``(model, batch, t, noise) -> scalar``.
        checkpoint: a file for the training's state, written every ``checkpoint_every`` steps. Where it is there
            already, training goes on from it and ends as if it had never been stopped; the loader is walked again up
            to there. Loading it runs no code. Nodes of a cluster have to see the same file.
        checkpoint_every: steps between two writes.
        accelerator: one of your own: its trackers get every step's loss, gradient norm and rate
            (``Accelerator(log_with="tensorboard", project_dir=…)``), its mixed precision is used (float16 with loss
            scaling too); None makes one.
        guard: the loss is looked at before and after, on samples of the loader, and where it isn't lower the model gets
            back the weights that it had: a few steps make a compensated model worse. Not with a loader that can be
            iterated only once.
        seed: of timesteps and noise.
        progress: False shows none: a bar in a terminal, else a line every tenth of the steps.

    Returns:
        Every step's loss, and the seconds.

    Raises:
        ValueError: an empty loader, a setting that can't train, a model without trainable parameters, a teacher that
            doesn't fit, or a checkpoint of another training.
        FloatingPointError: a loss or gradient is not finite; it doesn't reach the weights.

    Example:
        >>> from diffusers import UNet2DModel
        >>> unet = UNet2DModel(8, block_out_channels=(8,), down_block_types=("DownBlock2D",),
        ...                    up_block_types=("UpBlock2D",), norm_num_groups=4)
        >>> done = finetune(unet, [torch.rand(8, 3, 8, 8) * 2 - 1], steps=3, progress=False)
        >>> len(done.losses)
        3

    Source: the finetuning of Fang et al., 2023 (Adam, clip 1, EMA 0.9999), with a schedule for short runs; Hinton et
    al., Distilling the Knowledge in a Neural Network (arXiv 1503.02531).
    """
    check_trainable(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with _accelerating(accelerator, device) as found:
        return _finetune(
            model,
            loader,
            scheduler,
            steps=steps,
            lr=lr,
            teacher=teacher,
            teacher_share=teacher_share,
            loss=loss,
            warmup=warmup,
            schedule=schedule,
            clip=clip,
            ema=ema,
            accumulate=accumulate,
            gradient_checkpointing=gradient_checkpointing,
            loss_fn=loss_fn,
            autocast=autocast,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            accelerator=found,
            guard=guard,
            seed=seed,
            progress=progress,
        )


@together
def _finetune(
    model: nn.Module,
    loader: Iterable[Any],
    scheduler: Any,
    *,
    steps: int,
    lr: float | None,
    teacher: nn.Module | str | os.PathLike[str] | None,
    teacher_share: float,
    loss: RecoveryLoss | StepLoss | None,
    warmup: int | None,
    schedule: str,
    clip: float,
    ema: float,
    accumulate: int,
    gradient_checkpointing: bool,
    loss_fn: LossFunction | None,
    autocast: torch.dtype | None,
    checkpoint: str | os.PathLike[str] | None,
    checkpoint_every: int,
    accelerator: Accelerator,
    guard: bool,
    seed: int,
    progress: bool,
) -> Finetuned:
    """:func:`finetune`, once the processes know of each other."""
    lr = LEARNING_RATE if lr is None else lr
    warmup = min(500, steps // 10) if warmup is None else warmup
    _check_settings(steps, lr, warmup, clip, ema, teacher_share, teacher is not None)
    _check_counts(accumulate, checkpoint_every)
    settings = Settings(steps, clip, accumulate, seed)
    parameters = _trainable(model)
    objective = make_objective(model, scheduler, loss_fn)
    start = time.perf_counter()
    with ExitStack() as stack:
        sharded = bool(fsdp_modules(model))
        if accelerator.num_processes > 1 and not sharded:
            model.to(accelerator.device)
        if sharded and accelerator.scaler is not None:
            raise ValueError("a sharded model can't be trained in float16, with loss scaling: take bf16")
        stack.callback(reshard, model)
        autocast = _OF_ACCELERATE.get(accelerator.mixed_precision) if autocast is None else autocast
        if teacher is not None:
            teacher = stack.enter_context(in_mode(find_teacher(teacher, model), training=False))
        example = None
        if loss == "features" and teacher is not None and not knows_inputs(teacher):
            example, loader = first_call(teacher, as_loader(loader), scheduler=scheduler, loss_fn=loss_fn, seed=seed)
        minimised = step_loss_of(loss, model, teacher, objective, teacher_share, autocast, example)
        stack.enter_context(in_mode(model, training=teacher is None))
        if gradient_checkpointing:
            stack.enter_context(_checkpointing(model))
        optimizer = torch.optim.Adam(parameters, lr=lr)
        rate = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
        stack.callback(optimizer.zero_grad, set_to_none=True)
        stack.enter_context(own_randomness(seed))
        about = {
            **{"lr": lr, "warmup": warmup, "schedule": schedule, "ema": ema, "autocast": str(autocast)},
            **{"teacher_share": teacher_share if teacher is not None else None, **asdict(settings)},
            "loss": loss if loss is None or isinstance(loss, str) else type(loss).__name__,
        }
        look = None
        if guard and can_look_twice(loader):
            door, own = _door(model, loss_fn), callable(loss) or loss_fn is not None
            look = Guard(model, as_loader(loader), door, objective, minimised, autocast, seed, differentiates=own)
        before = None if look is None else look.loss()
        meet()  # accelerate waits without looking for news
        step = Step(model, minimised, autocast)  # FSDP2 exchanges gradients itself
        step_loss, prepared = (
            (step, accelerator.prepare(optimizer)) if sharded else accelerator.prepare(step, optimizer)
        )
        training = Training(
            model=model,
            parameters=parameters,
            step_loss=step_loss,
            objective=objective,
            optimizer=prepared,
            rate=rate,
            average=EMAModel(parameters, decay=ema),
            position=Position(as_loader(loader), seed, _door(model, loss_fn)),
            accelerator=accelerator,
            settings=settings,
        )
        stack.enter_context(_tracking(accelerator, about))
        path = None if checkpoint is None else Path(checkpoint)
        resumed = 0 if path is None else training.load(path, about)
        shown = progress and accelerator.is_main_process
        training.run(Progress("finetuning", steps, resumed, show=shown), path, checkpoint_every, about)
        after = None if look is None else look.loss()
        helped = before is None or after is None or after < before
        if look is not None and not helped:
            look.put_back()
    return Finetuned(tuple(training.losses), time.perf_counter() - start, resumed, before, after, helped)


# Ways of accelerate to spread one model's weights over processes while it prepares it.
_SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP")


_OF_ACCELERATE = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def _accelerating(given: Accelerator | None, device: torch.device) -> Iterator[Accelerator]:
    """The caller's accelerator, or one whose choices are forgotten afterwards, so that they bind nobody else."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState, PartialState

    if given is not None:
        _check_sharding(given)
        yield given
        return
    first = not AcceleratorState._shared_state
    alone = not PartialState._shared_state
    # A loss need not reach every parameter.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    try:
        made = Accelerator(
            cpu=device.type == "cpu" and ("LOCAL_RANK" not in os.environ or not torch.cuda.is_available()),
            device_placement=False,
            kwargs_handlers=[unused],
        )
        _check_sharding(made)
        ranks = rank_and_count()[1]
        if ranks != made.num_processes:
            raise ValueError(
                f"torch.distributed has {ranks} processes, accelerate knows of {made.num_processes}: start them with "
                "accelerate launch or torchrun, or set LOCAL_RANK, RANK and WORLD_SIZE"
            )
        yield made
    finally:
        if first:
            AcceleratorState._reset_state(reset_partial_state=alone and rank_and_count()[1] == 1)


def _check_sharding(accelerator: Accelerator) -> None:
    kind = accelerator.distributed_type.value
    if kind in _SHARDED:
        raise ValueError(
            f"finetune doesn't support {kind}: configure accelerate for several processes without it. A model that one "
            "device doesn't hold is sharded before, by fully_shard of torch.distributed.fsdp"
        )


@contextmanager
def _checkpointing(model: nn.Module) -> Iterator[None]:
    """Activations are computed anew in the backward pass; afterwards as before."""
    enable = getattr(model, "enable_gradient_checkpointing", None)
    if enable is None or not getattr(model, "_supports_gradient_checkpointing", True):
        raise ValueError(f"{type(model).__name__} offers no gradient checkpointing: leave it out")
    was = bool(getattr(model, "is_gradient_checkpointing", False))
    enable()
    try:
        yield
    finally:
        if not was:
            model.disable_gradient_checkpointing()  # type: ignore[operator]


@contextmanager
def _tracking(accelerator: Accelerator, about: dict[str, Any]) -> Iterator[None]:
    """The accelerator's trackers, begun if they weren't; those that were begun here end with the training."""
    begin = bool(accelerator.log_with) and not accelerator.trackers
    if begin:
        accelerator.init_trackers("diffprune-fast", {k: v for k, v in about.items() if v is not None})
    try:
        yield
    finally:
        for tracker in accelerator.trackers if begin else ():
            tracker.finish()


def _check_counts(accumulate: int, checkpoint_every: int) -> None:
    """Raises ValueError."""
    if accumulate < 1:
        raise ValueError(f"accumulate is {accumulate}: a step needs at least one batch")
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every is {checkpoint_every}: it must be at least 1")


def _check_settings(
    steps: int, lr: float, warmup: int, clip: float, ema: float, teacher_share: float, has_teacher: bool
) -> None:
    """Raises ValueError for numbers that train nothing, or away from the minimum."""
    if steps < 1:
        raise ValueError(f"steps is {steps}: finetuning needs at least one")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr is {lr}: it must be above 0, such as {LEARNING_RATE}")
    if warmup < 0:
        raise ValueError(f"warmup is {warmup}: it is a number of steps, 0 for none")
    if not clip > 0:
        raise ValueError(f"clip is {clip}: it must be above 0 (math.inf doesn't clip)")
    if not 0 <= ema < 1:
        raise ValueError(f"ema is {ema}: it must be at least 0 (no average) and below 1")
    if not 0 < teacher_share <= 1:
        raise ValueError(f"teacher_share is {teacher_share}: it must be above 0 and at most 1")
    if teacher_share < 1 and not has_teacher:
        raise ValueError(f"teacher_share is {teacher_share}, but there is no teacher: give teacher=, the dense model")


def _door(model: nn.Module, loss_fn: LossFunction | None) -> Callable[[Any], Any]:
    """What batches come through, the door that scoring has."""

    def read(found: Any) -> Any:
        batch = as_batch(found)
        check_batch(unwrapped(model), batch, loss_fn)
        return batch

    return read


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(f"no parameter of {type(model).__name__} requires a gradient: there is nothing to finetune")
    return parameters
