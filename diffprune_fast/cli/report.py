"""``diffprune-fast report``: one page of what was evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from .app import RESULT, RUN, Force, Ran, app, check_out, errors_in_one_line, say
from .prune import traced

if TYPE_CHECKING:
    from ..report.table import Measured
    from ..report.whole import Whole

SHOWN = 24


@app.command()
def report(
    context: typer.Context,
    evaluations: Annotated[list[Path], typer.Argument(help="Folders that evaluate wrote; the original's first.")],
    out: Annotated[Path, typer.Option(help="The HTML file; the numbers go beside it as .json and .csv.")],
    title: Annotated[str, typer.Option(help="Of the page.")] = "A pruned diffusion model",
    pruned: Annotated[Path | None, typer.Option(help="Folder of the pruned model: budget and losses.")] = None,
    dense: Annotated[Path | None, typer.Option(help="Folder of the dense model: what of it stayed.")] = None,
    trained: Annotated[Optional[Path], typer.Option(help="Folder of the finetuned model: its curve.")] = None,  # noqa: UP045
    force: Force = False,
) -> None:
    """Show evaluated models side by side on one self-contained page."""
    with errors_in_one_line():
        from ..report.page import write_report

        ran = Ran(context)
        check_out(out, None, force)
        found = [_evaluation(folder) for folder in evaluations]
        shown, whole = _pruning(pruned, dense)
        figures = _samples(evaluations, found) | _curves(found, trained) | shown
        made = [_command_of(folder) for folder in (pruned, trained) if folder is not None]
        out.parent.mkdir(parents=True, exist_ok=True)
        write_report(
            out,
            [_row(x) for x in found],
            figures,
            title=title,
            seeds=max(figure["n"] for x in found for figure in x["figures"].values()),
            notes={**_facts(pruned), **_of_training(trained), "machine of the figures": _machine(found[0]["run"])},
            code=_code(trained or pruned, [*made, *(x["run"]["command"] for x in found), ran.command]),
            whole=whole,
        )
        say(f"saved: {out}")


def _evaluation(folder: Path) -> dict[str, Any]:
    path = folder if folder.is_file() else folder / RESULT
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found["figures"], found["params"], found["run"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no evaluation ({error}): make it with diffprune-fast evaluate") from error
    return found


def _row(found: dict[str, Any]) -> Measured:
    from ..report.table import Measured

    figures = {name: x["mean"] for name, x in found["figures"].items()}
    spread = {name: x["deviation"] for name, x in found["figures"].items() if x["deviation"] is not None}
    for forward in found["forwards"]:
        figures[f"ms/forward, batch {forward['batch_size']}"] = 1e3 * forward["seconds"]
        if forward["peak_bytes"] is not None:
            figures[f"peak MiB, batch {forward['batch_size']}"] = forward["peak_bytes"] / 2**20
    return Measured(found["name"], found["params"], found["macs"], None, {"": figures}, {"": spread})


def _samples(folders: list[Path], found: list[dict[str, Any]]) -> dict[str, Any]:
    import numpy as np
    import torch
    from PIL import Image

    from ..report.figures import sample_grids

    grids = {}
    for folder, x in zip(folders, found, strict=True):
        paths = sorted((folder / "samples").glob("[0-9]*.png"))[:SHOWN]
        if paths:
            pixels = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths])).float() / 127.5 - 1
            grids[x["name"]] = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    if not grids:
        return {}
    steps = found[0]["run"]["steps"]
    return {"Samples": (sample_grids(grids), f"The same noise for every model, {steps} steps, no picking.")}


def _curves(found: list[dict[str, Any]], trained: Path | None) -> dict[str, Any]:
    from ..report.curves import timestep_curves, training_curve

    figures: dict[str, Any] = {
        "Loss over the timesteps": (
            timestep_curves({x["name"]: x["by_timestep"] for x in found}),
            "On the held-out images, the same noise for every model; each point is a tenth of the timesteps.",
        )
    }
    losses = [] if trained is None else _run_of(trained).get("losses", [])
    if losses:
        text = f"{len(losses)} steps; what the training minimised, averaged over a few steps."
        figures["The finetune"] = (training_curve(losses), text)
    return figures


def _pruning(pruned: Path | None, dense: Path | None) -> tuple[dict[str, Any], list[Whole]]:
    """What stayed, which timesteps counted, why channels stayed; nothing for a folder without a manifest at its top."""
    import numpy as np

    from ..checkpoint.manifest import MANIFEST, read_manifest
    from ..report.figures import kept_channels, loss_curve
    from ..report.whole import kept_whole
    from ..scoring.scores import LossCurve

    if pruned is None or not (pruned / MANIFEST).exists():
        return {}, []
    figures: dict[str, Any] = {}
    whole: list[Whole] = []
    manifest = read_manifest(pruned)
    if dense is not None:
        plans = (traced(dense, None, units) for units in ("auto", "dims", "heads"))
        plan = next((plan for plan in plans if plan.hash == manifest["plan"]), None)
        if plan is not None:
            text = "Channels that must be removed together form a group; each bar is one, and how much of it stays."
            figures["Kept channels"] = (kept_channels(plan, manifest["keep"]), text)
            whole = kept_whole(plan, manifest["keep"])
    curve = (manifest.get("scores") or {}).get("curve")
    if curve is not None:
        found = LossCurve(np.array(curve["timesteps"]), np.array(curve["losses"]), curve["threshold"])
        text = "Channels are scored at the timesteps whose loss is above the threshold (Diff-Pruning, section 4.2)."
        figures["Which timesteps count"] = (loss_curve(found), text)
    return figures, whole


def _facts(pruned: Path | None) -> dict[str, str]:
    from ..checkpoint.manifest import MANIFEST, read_manifest
    from ..report.card import facts_of

    if pruned is None:
        return {}
    folders = [p.parent for p in (pruned / MANIFEST, *pruned.glob(f"*/{MANIFEST}")) if p.exists()]
    return facts_of(read_manifest(folders[0])) if folders else {}


def _of_training(trained: Path | None) -> dict[str, str]:
    """That the training was in vain, if it was."""
    about = {} if trained is None else _run_of(trained)
    if about.get("helped", True):
        return {}
    figures = f"loss {about['after']:.4g} after, {about['before']:.4g} before"
    return {"the finetune": f"didn't lower the loss ({figures}): the weights are those of before"}


def _run_of(folder: Path) -> dict[str, Any]:
    path = folder / RUN
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _command_of(folder: Path) -> str:
    return str(_run_of(folder).get("command", ""))


def _machine(run: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return f"{run['machine']['gpu'] or run['machine']['cpu']}; {versions}"


def _code(final: Path | None, commands: list[str]) -> dict[str, str]:
    from ..report.card import how_to_load

    code = {"How to reproduce it": "\n".join(dict.fromkeys(filter(None, commands)))}
    return code if final is None else {"How to load it": how_to_load(final), **code}
