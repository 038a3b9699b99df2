"""The command line: ``diffprune-fast info``, ``trace`` and ``prune``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from .choices import (
    Allocation,
    CompensationMode,
    CriterionName,
    Estimator,
    Layouts,
    NormGroups,
    RankingName,
    Rounding,
    Units,
)

if TYPE_CHECKING:
    from .plan.plan import Plan
    from .result import PruneResult

app = typer.Typer(
    name="diffprune-fast",
    help="Make trained diffusion models smaller and faster by removing whole channels.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
_show_traceback = False
INDEX = "model_index.json"

ModelDir = Annotated[Path, typer.Argument(help="Folder of a diffusers model or pipeline, pruned before or not.")]


def main() -> None:
    """Entry point of the console script."""
    app()


@app.callback()
def _options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
) -> None:
    global _show_traceback
    _show_traceback = traceback


@app.command()
def info() -> None:
    """Print versions, devices, and which backends can serve and why the others can't."""
    from .ops.info import info as ops_info

    typer.echo(ops_info())


@app.command()
def trace(
    model_dir: ModelDir,
    component: Annotated[Optional[str], typer.Option(help="Of a pipeline. Default: its denoiser.")] = None,  # noqa: UP045
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Also write the plan to this file.")] = None,  # noqa: UP045 (typer on Python 3.10)
    units: Annotated[Units, typer.Option(help="What can go of attentions.")] = "auto",
) -> None:
    """Print which channels of a model go together, and which stay and why."""
    with _errors_in_one_line():
        plan = _traced(model_dir, component, units)
        if json_file is not None:
            json_file.write_text(plan.to_json(), encoding="utf-8")
        typer.echo(str(plan))


@app.command()
def prune(
    model_dir: ModelDir,
    out: Annotated[Path, typer.Option(help="Folder for the pruned model.")],
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Folder of training images (any depth); captions in metadata.jsonl or .txt files beside them."
        ),
    ] = None,
    component: Annotated[Optional[str], typer.Option(help="Of a pipeline. Default: its denoiser.")] = None,  # noqa: UP045
    ratio: Annotated[Optional[float], typer.Option(help="Share of units to remove. Default: 0.3.")] = None,  # noqa: UP045
    params: Annotated[Optional[float], typer.Option(help="Parameters to keep: a share or a number.")] = None,  # noqa: UP045
    macs: Annotated[Optional[float], typer.Option(help="MACs to keep: a share or a number.")] = None,  # noqa: UP045
    like: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="In place of a budget, a smaller config: '{\"block_out_channels\": [96, 192]}' or a file."),
    ] = None,
    layout: Annotated[Layouts, typer.Option(help="config: widths that a config of the class has.")] = "free",
    ranking: Annotated[Optional[RankingName], typer.Option(help="Default: local for a ratio.")] = None,  # noqa: UP045
    allocation: Annotated[
        Optional[Allocation],  # noqa: UP045
        typer.Option(help="Of a global ranking. Default: gauss-newton where there are images."),
    ] = None,
    estimator: Annotated[Estimator, typer.Option(help="How the sum is estimated.")] = "micro",
    criterion: Annotated[CriterionName, typer.Option(help="What a score is.")] = "diff-pruning",
    units: Annotated[Units, typer.Option(help="What can go of attentions.")] = "auto",
    norm_groups: Annotated[NormGroups, typer.Option(help="What stays of norm groups.")] = "count",
    round_to: Annotated[int, typer.Option(help="Widths become multiples of so many channels.")] = 8,
    rounding: Annotated[Optional[Rounding], typer.Option(help="reference: the published code's counts.")] = None,  # noqa: UP045
    ignore: Annotated[Optional[list[str]], typer.Option(help="Pattern of groups or parameters to keep whole.")] = None,  # noqa: UP045
    drop_blocks: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Residual blocks that go first: how many, or names or patterns with commas between."),
    ] = None,
    compensate: Annotated[
        CompensationMode, typer.Option(help="How layers that lost inputs are solved anew, where there are images.")
    ] = "auto",
    no_compensate: Annotated[bool, typer.Option("--no-compensate", help="Leave layers as sliced.")] = False,
    no_rotate: Annotated[bool, typer.Option("--no-rotate", help="Leave attention heads in their basis.")] = False,
    prompts: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Without images: a text file with a prompt on each line, of which the pipeline makes them."),
    ] = None,
    own_samples: Annotated[
        bool, typer.Option("--own-samples", help="Without images: the model makes them itself, of noise or classes.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be left and what compensation would take; write nothing.")
    ] = False,
    scheduler: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder of the scheduler's config. Default: the model's pipeline's, else 1000-step DDPM."),
    ] = None,
    size: Annotated[Optional[int], typer.Option(help="Image size. Default: what the model is made for.")] = None,  # noqa: UP045
    batch_size: Annotated[int, typer.Option(help="Images per micro-batch.")] = 32,
    max_samples: Annotated[int, typer.Option(help="The most images to score with.")] = 4096,
    seed: Annotated[int, typer.Option(help="Same seed, same result.")] = 0,
    device: Annotated[Optional[str], typer.Option(help="cpu, cuda, ... Default: cuda where there is one.")] = None,  # noqa: UP045
) -> None:
    """Prune a model, or a component of a pipeline, to a budget and save it."""
    with _errors_in_one_line():
        from .method import score_and_prune
        from .selection.budgets import parse_budgets

        _check_out(out, model_dir)
        budget = {"ratio": ratio, "params": params, "macs": macs}
        parse_budgets(budget)
        if dry_run and like is not None:
            raise ValueError("--dry-run: with --like the sizes are those of the config")
        if dry_run:
            how = {"norm_groups": norm_groups, "round_to": round_to, "ignore": ignore or (), "ranking": ranking}
            return typer.echo(_rehearsed(_traced(model_dir, component, units), {**budget, **how}, compensate, device))
        model = _load(model_dir).to(_device(device))
        result = score_and_prune(
            model,
            _loader(model, component, images, prompts, own_samples, criterion, size, batch_size, seed),
            component=component,
            ratio=ratio,
            params=params,
            macs=macs,
            like=_like(like),
            layout=layout,
            ranking=ranking,
            allocation=allocation,
            estimator=estimator,
            criterion=criterion,
            units=units,
            norm_groups=norm_groups,
            round_to=round_to,
            rounding=rounding,
            ignore=ignore or (),
            drop_blocks=_blocks(drop_blocks),
            rotate=not no_rotate,
            compensate=False if no_compensate else compensate,
            **_scheduler(model_dir, scheduler),
            micro_batch=batch_size,
            min_samples=min(512, max_samples),
            max_samples=max_samples,
            seed=seed,
        )
        result.save_pretrained(out)
        typer.echo(str(result))
        typer.echo(f"saved:  {out} (load it with {_way_to_load(result, out)}({str(out)!r}))")


def _rehearsed(plan: Plan, selecting: dict[str, Any], mode: CompensationMode, device: str | None) -> str:
    """What a budget leaves, by scores that mean nothing, and what compensation would take."""
    from .compensation.estimates import estimate
    from .scoring.scores import rehearsed_scores
    from .selection.select import select

    chosen = select(plan, rehearsed_scores(plan), **selecting)
    left = f"before: {plan.complexity()}\nafter:  {plan.complexity(chosen.keep)} (which channels go is not known yet)"
    return f"{left}\n{estimate(plan, chosen.keep, mode=mode, device=_device(device))}"


def _traced(model_dir: Path, component: str | None, units: Units) -> Plan:
    """The plan of a model, which is built without its weights unless its pipeline has to say what it is called with."""
    from .architectures.inputs import knows_inputs
    from .tracing.trace import trace as trace_model

    pipeline, name = _place(model_dir, component)
    model = _load(model_dir if name is None or pipeline != model_dir else model_dir / name, weights=False)
    if pipeline is None or knows_inputs(model):  # without a pipeline trace() says what is lacking
        return trace_model(model, units=units)
    from .pipelines.components import find_component
    from .pipelines.encoding import example_call

    pipe = _load(pipeline)
    return trace_model(find_component(pipe, name)[1], example_call(pipe, name), units=units)


def _place(model_dir: Path, component: str | None) -> tuple[Path | None, str | None]:
    """The pipeline's folder that a model belongs to, and the model's name there; None where there is no pipeline."""
    from .pipelines.components import DENOISERS
    from .pipelines.loading import read_index

    if not (model_dir / INDEX).exists():
        if component is not None:
            raise ValueError(f"--component {component} is for pipelines: there is no {INDEX} in {model_dir}")
        whole = model_dir.resolve()
        return (whole.parent, whole.name) if (whole.parent / INDEX).exists() else (None, None)
    parts = sorted(name for name, value in read_index(model_dir).items() if isinstance(value, list) and value[0])
    name = component or next((n for n in DENOISERS if n in parts), None)
    if name not in parts:
        raise ValueError(f"{model_dir} has no {name or 'denoiser'}: give --component, one of {', '.join(parts)}")
    return model_dir, name


def _check_out(out: Path, model_dir: Path) -> None:
    """Before anything costs time: a folder that can be written to, and none of the original's."""
    source, target = model_dir.resolve(), out.resolve()
    source = source.parent if (source.parent / INDEX).exists() else source
    if target.is_relative_to(source):
        raise ValueError(
            f"--out {out} is in the model's own folder {source}: choose another, the original could be lost"
        )
    there = next(path for path in (target, *target.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"--out {out}: {there} is {'not writable' if there.is_dir() else 'a file'}, choose another folder"
        )


def _way_to_load(result: PruneResult, out: Path) -> str:
    from .checkpoint.manifest import MANIFEST, read_manifest

    manifests = out.glob(MANIFEST if result.pipeline is None else f"*/{MANIFEST}")
    plain = all(read_manifest(path.parent)["plain_config"] for path in manifests)
    if result.pipeline is not None:
        return "diffusers.DiffusionPipeline.from_pretrained" if plain else "diffprune_fast.pipeline_from_pretrained"
    return f"{f'diffusers.{type(result.model).__name__}' if plain else 'diffprune_fast'}.from_pretrained"


def _like(text: str | None) -> Any:
    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as e:
        raise ValueError(f"--like is not JSON ({e})") from None


def _blocks(text: str | None) -> int | list[str] | None:
    if text is None:
        return None
    return int(text) if text.isdigit() else [name.strip() for name in text.split(",")]


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Errors that the user can mend are one line and exit code 2; anything else is a defect and keeps its traceback."""
    from .checkpoint.manifest import CheckpointError
    from .slicing.verify import SliceError
    from .tracing.errors import TraceError

    try:
        yield
    except (ValueError, OSError, ArithmeticError, CheckpointError, SliceError, TraceError) as e:
        if _show_traceback:
            raise
        typer.echo(f"error: {' '.join(str(e).split())}", err=True)
        raise typer.Exit(2) from None


def _load(model_dir: Path, weights: bool = True) -> Any:
    """The model or pipeline in a folder; a model without weights is on ``meta`` where that is possible."""
    from .architectures.configs import build_on_meta
    from .checkpoint.loading import diffusers_class, from_pretrained
    from .checkpoint.manifest import CONFIG, MANIFEST

    if not model_dir.is_dir():
        raise ValueError(f"{model_dir} is not a folder: download the model and give its folder")
    if (model_dir / MANIFEST).exists():
        return from_pretrained(model_dir)
    if (model_dir / INDEX).exists():
        from .pipelines.loading import pipeline_from_pretrained

        return pipeline_from_pretrained(model_dir)
    config = _read_config(model_dir / CONFIG)
    cls: Any = diffusers_class(config["_class_name"])
    if not weights:
        return build_on_meta(cls, config)
    model, found = cls.from_pretrained(model_dir, output_loading_info=True)
    if found["missing_keys"] or found["mismatched_keys"]:
        wrong = [*found["missing_keys"], *map(str, found["mismatched_keys"])]
        raise ValueError(f"the weights in {model_dir} lack {wrong[0]} ({len(wrong)} in all): they are of another model")
    return model


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {path.parent} is not a folder of diffusers") from None
    except ValueError as e:
        raise ValueError(f"{path} is not JSON ({e})") from None
    if not isinstance(config, dict) or not isinstance(config.get("_class_name"), str):
        raise ValueError(f"{path} names no class (_class_name): it is not a config of diffusers")
    return config


def _device(name: str | None) -> Any:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name}: {str(e).splitlines()[0]}") from None
    return device


def _loader(
    model: Any,
    component: str | None,
    images: Path | None,
    prompts: Path | None,
    own_samples: bool,
    criterion: str,
    size: int | None,
    batch_size: int,
    seed: int,
) -> Any:
    from .architectures.inputs import knows_inputs
    from .objective.conditioning import is_autoencoder
    from .objective.image_folder import ImageFolder
    from .pipelines.components import find_component, image_shape, is_pipeline, takes_captions
    from .pipelines.encoding import check_known

    if (images is not None) + (prompts is not None) + own_samples > 1:
        raise ValueError("--images, --prompts and --own-samples: give one of them")
    if prompts is not None:
        lines = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"--prompts {prompts}: there is no line of text in it")
        return lines
    if own_samples:
        return None
    if images is None and criterion in ("magnitude", "random"):
        if not is_pipeline(model) and not knows_inputs(model):
            raise ValueError(
                f"no example inputs are known for {type(model).__name__}: give its pipeline's folder with --component"
            )
        return None
    if is_pipeline(model):
        check_known(*find_component(model, component))
    if images is None:
        raise ValueError(
            f"--images: criterion {criterion} needs a folder of training images; without one give --prompts (a "
            "pipeline from text) or --own-samples (any other)"
        )
    captions = False
    if is_pipeline(model):
        channels, default = image_shape(model)
        captions = takes_captions(model) and not is_autoencoder(find_component(model, component)[1])
    else:
        channels, default = model.config.get("in_channels", 3), model.config.get("sample_size")
    wanted = size or default
    if wanted is None:
        raise ValueError("--size: the model's config has no sample_size, so the images' size must be given")
    height, width = (wanted, wanted) if isinstance(wanted, int) else wanted
    return ImageFolder(images, (height, width), channels, batch_size, seed, captions)


def _scheduler(model_dir: Path, given: Path | None) -> dict[str, Any]:
    """The scheduler whose noise the model was trained with: the given one, or its pipeline's; as an option."""
    import diffusers

    name = "scheduler_config.json"
    places = [given] if given is not None else [model_dir, model_dir / "scheduler", model_dir.parent / "scheduler"]
    for place in places:
        if (place / name).exists():
            config = _read_config(place / name)
            cls = getattr(diffusers, config["_class_name"], None) if config["_class_name"].isidentifier() else None
            if not isinstance(cls, type) or not issubclass(cls, diffusers.SchedulerMixin):
                raise ValueError(f"{place / name}: {config['_class_name']!r} is not a scheduler of diffusers")
            return {"scheduler": cls.from_config(config)}  # type: ignore[attr-defined]
    if given is not None:
        raise ValueError(f"--scheduler {given}: there is no {name}")
    return {}
