"""``diffprune-fast finetune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..choices import Precision, RecoveryLoss
from .app import (
    Component,
    Device,
    Force,
    ModelDir,
    Ran,
    Seed,
    Size,
    SkipUnreadable,
    app,
    asked,
    check_out,
    errors_in_one_line,
    say,
)
from .loading import open_images, open_model

# The training's state in --out while it isn't finished.
STATE = "training.pt"


@app.command()
def finetune(
    context: typer.Context,
    model_dir: ModelDir,
    images: Annotated[Path, typer.Option(help="Folder of training images; captions as for prune, folders as classes.")],
    out: Annotated[Path, typer.Option(help="Folder for the trained model; an interrupted training there goes on.")],
    steps: Annotated[int, typer.Option(help="Of the optimiser.")],
    teacher: Annotated[Optional[Path], typer.Option(help="Folder of the dense model to be like.")] = None,  # noqa: UP045
    loss: Annotated[
        Optional[RecoveryLoss],  # noqa: UP045
        typer.Option(help="Default: distillation with a teacher, else noise."),
    ] = None,
    component: Component = None,
    lr: Annotated[Optional[float], typer.Option(help="Default: 2e-4.")] = None,  # noqa: UP045
    warmup: Annotated[Optional[int], typer.Option(help="Steps. Default: a tenth, at most 500.")] = None,  # noqa: UP045
    schedule: Annotated[str, typer.Option(help="What follows the warmup, as diffusers names it.")] = "cosine",
    clip: Annotated[float, typer.Option(help="The gradient's largest norm.")] = 1.0,
    ema: Annotated[float, typer.Option(help="Largest decay of the weights' moving average.")] = 0.9999,
    batch_size: Annotated[int, typer.Option(help="Images of a batch; several processes share it.")] = 32,
    accumulate: Annotated[int, typer.Option(help="Batches of a step.")] = 1,
    precision: Annotated[Optional[Precision], typer.Option(help="Default: as accelerate is configured.")] = None,  # noqa: UP045
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between two writes of the training's state.")] = 100,
    log_with: Annotated[Optional[str], typer.Option(help="tensorboard, wandb, ... (accelerate's trackers).")] = None,  # noqa: UP045
    scheduler: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder of the scheduler's config. Default: the model's, else 1000-step DDPM."),
    ] = None,
    size: Size = None,
    workers: Annotated[int, typer.Option(help="Processes that read images.")] = 0,
    skip_unreadable: SkipUnreadable = False,
    seed: Seed = 0,
    device: Device = None,
    force: Force = False,
) -> None:
    """Train a model on, towards the dense one's answers if that is given; started again it goes on where it was."""
    with errors_in_one_line():
        from ..recovery.finetune import finetune as train
        from ..report.card import write_card

        ran = Ran(context)
        check_out(out, model_dir, force, unfinished=STATE)
        opened = open_model(model_dir, component, scheduler, device)
        dense = None if teacher is None else open_model(teacher, component, scheduler, device).model
        found = open_images(opened, images, size, batch_size, seed, skip_unreadable, say)
        done = train(
            opened.model,
            found.loader(workers),
            opened.scheduler,
            steps=steps,
            lr=lr,
            teacher=dense,
            loss=loss,
            warmup=warmup,
            schedule=schedule,
            clip=clip,
            ema=ema,
            accumulate=accumulate,
            gradient_checkpointing=gradient_checkpointing,
            checkpoint=out / STATE,
            checkpoint_every=checkpoint_every,
            accelerator=_accelerator(precision, log_with, out, opened.model),
            seed=seed,
            progress=not asked.quiet,
        )
        if not _is_first():
            return
        opened.save(out)
        looked = {"before": done.before, "after": done.after, "helped": done.helped}
        ran.write(
            out, seed=seed, losses=list(done.losses), resumed=done.resumed, training_seconds=done.seconds, **looked
        )
        write_card(out, command=ran.command)
        (out / STATE).unlink()
        last = done.losses[-max(1, len(done.losses) // 10) :]
        say(f"trained: {steps} steps, {done.seconds:.0f} s; mean loss of the last tenth {sum(last) / len(last):.4g}")
        if not done.helped:
            say(f"not lower: loss {done.after:.4g} after, {done.before:.4g} before; the weights of before were saved")
        say(f"saved:   {out}")


def _accelerator(precision: str | None, log_with: str | None, out: Path, model: Any) -> Any:
    """None where finetune shall make its own."""
    if precision is None and log_with is None:
        return None
    from accelerate import Accelerator, DistributedDataParallelKwargs

    return Accelerator(
        cpu=next(model.parameters()).device.type == "cpu",
        device_placement=False,
        mixed_precision=precision,
        log_with=log_with,
        project_dir=str(out.with_name(f"{out.name}-logs")),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def _is_first() -> bool:
    from ..objective.ranks import rank_and_count

    return rank_and_count()[0] == 0
