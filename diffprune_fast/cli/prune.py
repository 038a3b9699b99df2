"""``diffprune-fast info``, ``trace`` and ``prune``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..choices import (
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
from .app import (
    INDEX,
    Component,
    Device,
    Force,
    ModelDir,
    Ran,
    Seed,
    Size,
    app,
    asked,
    check_out,
    errors_in_one_line,
    say,
)
from .loading import device_of, image_loader, load, located, scheduler_of

# The scoring's state in --out while it isn't finished.
STATE = "scoring.pt"

if TYPE_CHECKING:
    from ..plan.plan import Plan
    from ..result import PruneResult


@app.command()
def info() -> None:
    """Print versions, devices, and which backends can serve and why the others can't."""
    from ..ops.info import info as ops_info

    typer.echo(ops_info())


@app.command()
def trace(
    model_dir: ModelDir,
    component: Component = None,
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Also write the plan to this file.")] = None,  # noqa: UP045 (typer on Python 3.10)
    units: Annotated[Units, typer.Option(help="What can go of attentions.")] = "auto",
) -> None:
    """Print which channels of a model go together, and which stay and why."""
    with errors_in_one_line():
        plan = traced(model_dir, component, units)
        if json_file is not None:
            json_file.write_text(plan.to_json(), encoding="utf-8")
        typer.echo(str(plan))


@app.command()
def prune(
    context: typer.Context,
    model_dir: ModelDir,
    out: Annotated[Path, typer.Option(help="Folder for the pruned model; an interrupted scoring there goes on.")],
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Folder of training images (any depth); captions in metadata.jsonl or .txt files beside them."
        ),
    ] = None,
    component: Component = None,
    ratio: Annotated[Optional[float], typer.Option(help="Share of units to remove. Default: 0.3.")] = None,  # noqa: UP045
    params: Annotated[Optional[float], typer.Option(help="Parameters to keep: a share or a number.")] = None,  # noqa: UP045
    macs: Annotated[Optional[float], typer.Option(help="MACs to keep: a share or a number.")] = None,  # noqa: UP045
    latency: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Share of a forward's time to keep, measured on the device, for one sample."),
    ] = None,
    memory: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Peak memory of a forward of one sample to keep: a share or bytes."),
    ] = None,
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
    size: Size = None,
    batch_size: Annotated[int, typer.Option(help="Images per micro-batch.")] = 32,
    max_samples: Annotated[int, typer.Option(help="The most images to score with.")] = 4096,
    seed: Seed = 0,
    device: Device = None,
    force: Force = False,
) -> None:
    """Prune a model, or a component of a pipeline, to a budget and save it."""
    with errors_in_one_line():
        from ..method import score_and_prune
        from ..selection.budgets import parse_budgets

        ran = Ran(context)
        check_out(out, model_dir, force, unfinished=STATE)
        budget = {"ratio": ratio, "params": params, "macs": macs, "latency": latency, "memory": memory}
        parse_budgets(budget)
        if dry_run and (latency is not None or memory is not None):
            raise ValueError("--dry-run: time and memory are measured on the model itself, leave it out")
        if dry_run and like is not None:
            raise ValueError("--dry-run: with --like the sizes are those of the config")
        if dry_run:
            how = {"norm_groups": norm_groups, "round_to": round_to, "ignore": ignore or (), "ranking": ranking}
            return say(rehearsed(traced(model_dir, component, units), {**budget, **how}, compensate, device))
        model_dir = located(model_dir)
        trained_with = scheduler_of(model_dir, scheduler)
        model = load(model_dir).to(device_of(device))
        result = score_and_prune(
            model,
            image_loader(model, component, images, prompts, own_samples, criterion, size, batch_size, seed),
            component=component,
            ratio=ratio,
            params=params,
            macs=macs,
            latency=latency,
            memory=memory,
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
            **({} if trained_with is None else {"scheduler": trained_with}),
            micro_batch=batch_size,
            min_samples=min(512, max_samples),
            max_samples=max_samples,
            seed=seed,
            checkpoint=out / STATE,
            progress=not asked.quiet,
        )
        result.save_pretrained(out)
        if trained_with is not None and result.pipeline is None:
            trained_with.save_pretrained(out)
        ran.write(out, seed=seed)
        (out / STATE).unlink(missing_ok=True)
        say(str(result))
        say(f"saved:  {out} (load it with {_way_toload(result, out)}({str(out)!r}))")


def rehearsed(plan: Plan, selecting: dict[str, Any], mode: CompensationMode, device: str | None) -> str:
    """What a budget leaves, by scores that mean nothing, and what compensation would take."""
    from ..compensation.estimates import estimate
    from ..scoring.scores import rehearsed_scores
    from ..selection.select import select

    chosen = select(plan, rehearsed_scores(plan), **selecting)
    left = f"before: {plan.complexity()}\nafter:  {plan.complexity(chosen.keep)} (which channels go is not known yet)"
    return f"{left}\n{estimate(plan, chosen.keep, mode=mode, device=device_of(device))}"


def traced(model_dir: Path, component: str | None, units: Units) -> Plan:
    """The plan of a model, which is built without its weights unless its pipeline has to say what it is called with."""
    from ..architectures.inputs import knows_inputs
    from ..tracing.trace import trace as trace_model

    folder, pipeline, name = _place(located(model_dir), component)
    model = load(folder, weights=False)
    if pipeline is None or knows_inputs(model):  # without a pipeline trace() says what is lacking
        return trace_model(model, units=units)
    from ..pipelines.components import find_component
    from ..pipelines.encoding import example_call

    pipe = load(pipeline)
    return trace_model(find_component(pipe, name)[1], example_call(pipe, name), units=units)


def _place(model_dir: Path, component: str | None) -> tuple[Path, Path | None, str | None]:
    """The model's folder, the pipeline's that it belongs to, and its name there; None where there is no pipeline."""
    from ..pipelines.components import DENOISERS
    from ..pipelines.index import read_index
    from ..pipelines.loading import component_folder

    if not (model_dir / INDEX).exists():
        if component is not None:
            raise ValueError(f"--component {component} is for pipelines: there is no {INDEX} in {model_dir}")
        whole = model_dir.resolve()
        return (model_dir, whole.parent, whole.name) if (whole.parent / INDEX).exists() else (model_dir, None, None)
    parts = {name: found for name, found in sorted(read_index(model_dir).components.items()) if found is not None}
    name = component or next((n for n in DENOISERS if n in parts), None)
    if name is None or name not in parts:
        raise ValueError(f"{model_dir} has no {name or 'denoiser'}: give --component, one of {', '.join(parts)}")
    return component_folder(model_dir, name, parts[name]), model_dir, name


def _way_toload(result: PruneResult, out: Path) -> str:
    from ..checkpoint.manifest import MANIFEST, read_manifest

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
