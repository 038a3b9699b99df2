"""``diffprune-fast run``: prune, finetune, sample, evaluate and report from one YAML, gone on with where it stopped."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import RESULT, app, errors_in_one_line, say, write_json
from .finetune import STATE as TRAINING
from .prune import STATE as SCORING

# Which stages are done, in the run's folder.
STAGES = "stages.json"
EVALUATIONS, REFERENCE, PAGE = "evaluations", "reference.npz", "report.html"

# Options that hold for every command that has them.
SHARED = ("component", "scheduler", "size", "seed", "device", "skip_unreadable")
SECTIONS = ("prune", "finetune", "sample", "evaluate", "report")
NEEDED = ("model", "images", "out")


@dataclass(frozen=True)
class Stage:
    """A command with its arguments, and what it writes. goes_on: the file there with which it continues what it left
    unfinished."""

    name: str
    words: tuple[str, ...]
    out: Path
    goes_on: str | None = None

    @property
    def line(self) -> str:
        return shlex.join(("diffprune-fast", *self.words))


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="YAML: model, images, out, and the commands' options.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands and run none.")] = False,
) -> None:
    """Everything from one file: a smaller model, recovered, with samples, figures, a report and a card.

    Run it again after a break, or with other settings: what is done and still asked for in the same way is not done
    again.
    """
    with errors_in_one_line():
        asked_for = read_config(config)
        stages = stages_of(asked_for)
        for stage in stages:
            _parsed(stage, config).close()
        if dry_run:
            return typer.echo("\n".join(stage.line for stage in stages))
        folder = Path(asked_for["out"])
        folder.mkdir(parents=True, exist_ok=True)
        known, fresh = _known(folder), True
        for i, stage in enumerate(stages, 1):
            before = known.get(stage.name, {})
            same = fresh and before.get("command") == stage.line
            if same and before.get("done") and stage.out.exists():
                say(f"{i} of {len(stages)}, {stage.name}: done before")
                continue
            _make_room(stage, same)
            if stage.name == "evaluate dense":
                _removed(folder / REFERENCE)  # it may be of other images or another extractor
            fresh = same  # after something that was asked for anew, everything is done anew
            _note(folder, known, stage, done=False)
            say(f"{i} of {len(stages)}, {stage.name}: {stage.line}")
            _run(stage, config)
            _note(folder, known, stage, done=True)
        _finish(asked_for, config)
        say(f"done: {folder / PAGE}")


def read_config(path: Path) -> dict[str, Any]:
    """The YAML, with what it must have. Raises ValueError naming what is wrong."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} has no settings: it needs {', '.join(NEEDED)}")
    for key in NEEDED:
        if not isinstance(found.get(key), str):
            raise ValueError(f"{path}: {key} is missing, a folder's path")
    known = {*NEEDED, *SECTIONS, *SHARED, "held_out"}
    unknown = sorted(found.keys() - known)
    if unknown:
        raise ValueError(f"{path}: {unknown[0]!r} is not known; there are {', '.join(sorted(known))}")
    for section in SECTIONS:
        if not isinstance(found.get(section) or {}, dict):
            raise ValueError(f"{path}: {section} has to be options with their values")
    return found


def stages_of(asked_for: Mapping[str, Any]) -> list[Stage]:
    """The commands, in order."""
    out, model, images = Path(asked_for["out"]), asked_for["model"], asked_for["images"]
    held_out = asked_for.get("held_out") or images
    section = {name: dict(asked_for.get(name) or {}) for name in SECTIONS}
    shared = {key: asked_for[key] for key in SHARED if asked_for.get(key) is not None}

    def command(name: str, words: list[str], target: Path, more: Mapping[str, Any]) -> tuple[str, ...]:
        has = {p.name for p in _command(name).params}
        given = {**{k: v for k, v in shared.items() if k in has}, **more, **section[name]}
        return (name, *words, *_options(name, given), "--out", str(target))

    has_data = any(key in section["prune"] for key in ("own_samples", "prompts"))
    of_prune = {} if has_data else {"images": images}
    sliced, pruned, recovered = out / "sliced", out / "pruned", out / "recovered"
    stages = []
    compensates = not section["prune"].get("no_compensate")
    models = {"dense": Path(model)}
    if compensates:
        stages.append(
            Stage("slice", command("prune", [model], sliced, {**of_prune, "no_compensate": True}), sliced, SCORING)
        )
        models["sliced"] = sliced
    stages.append(Stage("prune", command("prune", [model], pruned, of_prune), pruned, SCORING))
    models["compensated" if compensates else "pruned"] = pruned
    if section["finetune"]:
        words = command("finetune", [str(pruned)], recovered, {"images": images, "teacher": model})
        stages.append(Stage("finetune", words, recovered, goes_on=TRAINING))
        models["recovered"] = recovered
    if section["sample"]:
        for name in ("dense", "recovered" if section["finetune"] else "pruned"):
            target = out / "samples" / name
            folder = model if name == "dense" else str(out / name)
            stages.append(Stage(f"sample {name}", command("sample", [folder], target, {}), target))
    reference = {"reference": out / REFERENCE} if section["evaluate"].get("features") else {}
    for name, folder_of in models.items():
        target = out / EVALUATIONS / name
        more = {"images": held_out, "name": name, **({} if name == "dense" else {"dense": model}), **reference}
        more |= {"reference_images": images} if reference and held_out != images else {}
        stages.append(Stage(f"evaluate {name}", command("evaluate", [str(folder_of)], target, more), target))
    shown = [str(out / EVALUATIONS / name) for name in models]
    more = {"pruned": pruned, "dense": model, **({"trained": recovered} if section["finetune"] else {})}
    stages.append(Stage("report", command("report", shown, out / PAGE, more), out / PAGE))
    return stages


def _command(name: str) -> Any:
    return typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]


def _options(command: str, given: Mapping[str, Any]) -> list[str]:
    """Options as a shell has them: true is a flag, a list is an option given several times."""
    words: list[str] = []
    flags = {p.name: p for p in _command(command).params}
    for key, value in given.items():
        name = f"--{key.replace('_', '-')}"
        if key in flags and getattr(flags[key], "is_flag", False):
            words += [flags[key].opts[0]] if value else []
        elif value is not None:
            for each in value if isinstance(value, list) else [value]:
                words += [name, str(each)]
    return words


def _parsed(stage: Stage, config: Path) -> Any:
    """The stage's options, checked as a shell's are; nothing is run. Raises ValueError."""
    name, *words = stage.words
    try:
        return _command(name).make_context(name, list(words))
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        raise ValueError(f"{config}, {stage.name}: {error.format_message()}") from None


def _run(stage: Stage, config: Path) -> None:
    with _parsed(stage, config) as context:
        context.command.invoke(context)


def _known(folder: Path) -> dict[str, Any]:
    """The stages that were begun before. Raises ValueError for a folder that holds something else."""
    path = folder / STAGES
    if not path.exists():
        if any(folder.iterdir()):
            raise ValueError(f"out: {folder} holds other things than a run's: choose an empty folder")
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path} can't be read ({error}): remove it to begin anew") from error


def _note(folder: Path, known: dict[str, Any], stage: Stage, *, done: bool) -> None:
    known[stage.name] = {"command": stage.line, "done": done}
    write_json(folder / STAGES, known)


def _removed(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _make_room(stage: Stage, same: bool) -> None:
    """Nothing stays of what broke off but the state that the same command goes on from."""
    state = stage.out / stage.goes_on if same and stage.goes_on is not None else None
    if state is None or not state.is_file():
        return _removed(stage.out)
    for path in stage.out.iterdir():
        if path != state:
            _removed(path)


def _finish(asked_for: Mapping[str, Any], config: Path) -> None:
    """The card beside the model that the run ended with says what was measured of it, and the run's own command."""
    from ..report.card import write_card
    from ..report.table import seeds_in_words

    out = Path(asked_for["out"])
    last = "recovered" if asked_for.get("finetune") else "pruned"
    name = "compensated" if last == "pruned" and not (asked_for.get("prune") or {}).get("no_compensate") else last
    found = json.loads((out / EVALUATIONS / name / RESULT).read_text(encoding="utf-8"))
    dense = json.loads((out / EVALUATIONS / "dense" / RESULT).read_text(encoding="utf-8"))
    figures = {}
    for metric, x in found["figures"].items():
        if metric == "s/image":
            continue  # the models were timed at different moments
        spread = "" if x["deviation"] is None else f" ± {x['deviation']:.2g}"
        beside = dense["figures"].get(metric)
        was = "" if beside is None else f" (dense {beside['mean']:.4g})"
        figures[metric] = f"{x['mean']:.4g}{spread}, {seeds_in_words(x['n'])}{was}"
    write_card(out / last, command=f"diffprune-fast run {config}", figures=figures)
