"""``diffprune-fast evaluate`` and ``inspect``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..choices import Backbone, NormGroups, Units
from .app import (
    RESULT,
    Component,
    Device,
    Force,
    ModelDir,
    Ran,
    Size,
    SkipUnreadable,
    app,
    check_out,
    emptied,
    errors_in_one_line,
    say,
    write_json,
)
from .loading import Opened, open_images, open_model
from .prune import rehearsed, traced
from .sampling import Cached, DdimSpacing, Labels, Prompts, Sampling, Solver, sampling_of, save_images


@app.command()
def evaluate(
    context: typer.Context,
    model_dir: ModelDir,
    images: Annotated[Path, typer.Option(help="Folder of images that weren't trained on.")],
    out: Annotated[Path, typer.Option(help="Folder for evaluation.json and samples of the first seed.")],
    name: Annotated[Optional[str], typer.Option(help="In the report. Default: the folder's.")] = None,  # noqa: UP045
    dense: Annotated[Optional[Path], typer.Option(help="Folder of the dense model, for SSIM and MSE.")] = None,  # noqa: UP045
    features: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="For Fréchet and kernel distance, precision and recall: TorchScript, ONNX, or inception."),
    ] = None,
    reference: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="File of the reference images' features: read where it is there, else written."),
    ] = None,
    reference_images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder that samples should be like. Default: --images."),
    ] = None,
    lpips: Annotated[
        Optional[Backbone],  # noqa: UP045
        typer.Option(help="Perceptual distance to the dense model's samples, by this network."),
    ] = None,
    clip: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="CLIP score of samples and --prompts: a CLIP model's folder, or its name on the hub."),
    ] = None,
    component: Component = None,
    n: Annotated[int, typer.Option(help="Samples of each seed; 0 for none.")] = 64,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    seeds: Annotated[int, typer.Option(help="So many seeds, for a mean and its deviation.")] = 3,
    labels: Labels = None,
    prompts: Prompts = None,
    solver: Solver = None,
    spacing: DdimSpacing = "uniform",
    cache: Cached = None,
    held_out: Annotated[int, typer.Option(help="Images for the loss.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Samples at once.")] = 64,
    batch_sizes: Annotated[str, typer.Option(help="At which a forward is timed.")] = "1,8",
    scheduler: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder of the config of the scheduler that the model was trained with."),
    ] = None,
    size: Size = None,
    skip_unreadable: SkipUnreadable = False,
    seed: Annotated[int, typer.Option(help="The first one.")] = 0,
    device: Device = None,
    force: Force = False,
) -> None:
    """Measure a model: size, time, memory, held-out loss, and samples beside the dense model's and real images."""
    with errors_in_one_line():
        from ..evaluation.evaluate import evaluate as measure

        ran = Ran(context)
        sampling = sampling_of(max(n, 1), steps, batch_size, labels, prompts, solver, spacing, cache)
        sizes, more = _numbers(batch_sizes), _scorers(lpips, clip, sampling, dense)
        if seeds < 1:
            raise ValueError(f"--seeds {seeds}: give at least 1")
        check_out(out, model_dir, force, empties=True)
        opened = open_model(model_dir, component, scheduler, device)
        held = open_images(opened, images, size, batch_size, seed, skip_unreadable, say)
        made = _Made(sampling, opened)
        as_trained = replace(sampling, cache=None)
        like = None if dense is None else _Made(as_trained, open_model(dense, component, scheduler, device))
        extractor = found = None
        if features is not None:
            extractor, found = _reference(features, reference, reference_images or images, opened, size, held)
        batch = held.first(held_out)
        result = measure(
            opened.model,
            batch,
            opened.scheduler,
            samples=made if n else None,
            dense_samples=like if n else None,
            extractor=extractor if n else None,
            reference=found if n else None,
            more=more,
            seeds=range(seed, seed + seeds),
            batch_sizes=sizes,
            example_inputs=_example(opened, batch),
        )
        emptied(out)
        if n:
            (out / "samples").mkdir()
            save_images(made(seed)[:64], out / "samples")
        about = ran.about(seed=seed, steps=steps, held_out=held_out)
        write_json(out / RESULT, {"name": name or model_dir.name, **result.as_json(), "run": about})
        say(str(result))
        say(f"saved: {out / RESULT}")


def _scorers(lpips: Backbone | None, clip: str | None, sampling: Sampling, dense: Path | None) -> dict[str, Any]:
    """The figures that need networks of others, by name. Raises ValueError for what they lack."""
    from ..evaluation import pretrained

    found = {}
    if lpips is not None:
        if dense is None:
            raise ValueError(f"--lpips {lpips}: it compares with the dense model's samples, give --dense")
        found["LPIPS"] = pretrained.lpips(lpips)
    if clip is not None:
        if sampling.prompts is None:
            raise ValueError(f"--clip {clip}: it compares with the prompts, give --prompts")
        found["CLIP score"] = pretrained.clip_score(sampling.prompts, clip)
    return found


class _Made:
    """Samples by seed, made once."""

    def __init__(self, sampling: Sampling, opened: Opened) -> None:
        self._sampling, self._opened, self._made = sampling, opened, dict[int, Any]()

    def __call__(self, seed: int) -> Any:
        if seed not in self._made:
            self._made[seed] = self._sampling.images(self._opened, seed)
        return self._made[seed]


def _reference(
    features: str, file: Path | None, folder: Path, opened: Opened, size: int | None, held: Any
) -> tuple[Any, Any]:
    """The extractor, and the reference images' features: from the file, or made and written there."""
    import torch

    from ..evaluation.distances import Reference, extracted, find_extractor
    from ..objective.image_folder import ImageFolder

    extractor = find_extractor(features, next(opened.model.parameters()).device)
    if file is not None and file.exists():
        return extractor, Reference.load(file)
    pictures = ImageFolder(folder, held.folder.size, held.folder.channels, held.folder.batch_size)
    found = Reference(
        torch.cat([torch.from_numpy(extracted(extractor, batch).features) for batch in pictures]).numpy()  # type: ignore[arg-type]
    )
    if file is not None:
        found.save(file)
    return extractor, found


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(x) for x in text.split(","))
    except ValueError:
        raise ValueError(f"--batch-sizes {text}: give numbers with commas between, such as 1,8") from None


def _example(opened: Opened, batch: Any) -> Any:
    from ..architectures.inputs import knows_inputs
    from ..objective.calls import first_call
    from ..pipelines.encoding import example_call

    if knows_inputs(opened.model):
        return None
    if opened.pipeline is None:
        return first_call(opened.model, [batch], scheduler=opened.scheduler)[0]
    return example_call(opened.pipeline, opened.component)


@app.command()
def inspect(
    model_dir: ModelDir,
    component: Component = None,
    ratio: Annotated[Optional[float], typer.Option(help="What a share of units less would leave.")] = None,  # noqa: UP045
    params: Annotated[Optional[float], typer.Option(help="What so many parameters would leave.")] = None,  # noqa: UP045
    macs: Annotated[Optional[float], typer.Option(help="What so many MACs would leave.")] = None,  # noqa: UP045
    units: Annotated[Units, typer.Option(help="What can go of attentions.")] = "auto",
    norm_groups: Annotated[NormGroups, typer.Option(help="What stays of norm groups.")] = "count",
    device: Annotated[Optional[str], typer.Option(help="Where it would be compensated.")] = None,  # noqa: UP045
) -> None:
    """Say what can be removed of a model, what stays and why, and what a budget would leave; no weight is read."""
    with errors_in_one_line():
        import numpy as np

        from ..selection.budgets import parse_budget

        budget = {"ratio": ratio, "params": params, "macs": macs}
        asked_for = any(x is not None for x in budget.values())
        if asked_for:
            parse_budget(budget)
        plan = traced(model_dir, component, units)
        least = plan.params({group.name: np.arange(1) for group in plan.groups})
        typer.echo(str(plan))
        typer.echo(f"prunable: at most {100 * (1 - least / plan.params()):.0f}% of the parameters")
        if asked_for:
            typer.echo(rehearsed(plan, {**budget, "norm_groups": norm_groups}, "auto", device))
