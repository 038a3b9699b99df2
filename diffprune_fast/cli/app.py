"""What every command shares: the application, its own options, errors of one line, folders that aren't overwritten."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

app = typer.Typer(
    name="diffprune-fast",
    help="Make trained diffusion models smaller and faster by removing whole channels.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
INDEX = "model_index.json"
# What shows that a folder was written here.
RUN, RESULT = "run.json", "evaluation.json"

ModelDir = Annotated[
    Path,
    typer.Argument(
        help="Folder of a diffusers model or pipeline, pruned before or not; or its name on the hub: user/repo, "
        "user/repo@revision."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is in --out.")]
# Optional, not | None: typer on Python 3.10.
Component = Annotated[Optional[str], typer.Option(help="Of a pipeline. Default: its denoiser.")]  # noqa: UP045
Size = Annotated[Optional[int], typer.Option(help="Image size. Default: what the model is made for.")]  # noqa: UP045
SkipUnreadable = Annotated[bool, typer.Option("--skip-unreadable", help="Leave out broken images.")]
Seed = Annotated[int, typer.Option(help="Same seed, same result.")]
Device = Annotated[Optional[str], typer.Option(help="cpu, cuda, ... Default: cuda where there is one.")]  # noqa: UP045

# What a missing module is for, by the extra that brings it.
EXTRAS = {
    "matplotlib": "report",
    "jinja2": "report",
    "torchmetrics": "evaluate",
    "transformers": "text",
    "torchvision": "lpips",
    "onnxruntime": "onnx",
}


@dataclass
class Asked:
    """The options before the command."""

    traceback: bool = False
    quiet: bool = False


asked = Asked()


def main() -> None:
    """Entry point of the console script."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"diffprune-fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and nothing else.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    asked.traceback, asked.quiet = traceback, quiet


def say(text: str) -> None:
    """Print ``text``, unless --quiet was asked for; of several processes the first one prints."""
    if not asked.quiet and os.environ.get("RANK", "0") == "0":
        typer.echo(text)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Errors that the user can mend are one line and exit code 2; anything else is a defect and keeps its traceback."""
    from ..checkpoint.errors import CheckpointError
    from ..slicing.verify import SliceError
    from ..tracing.errors import TraceError

    try:
        yield
    except (ValueError, OSError, ArithmeticError, CheckpointError, SliceError, TraceError, ModuleNotFoundError) as e:
        extra = EXTRAS.get(e.name or "") if isinstance(e, ModuleNotFoundError) else None
        if asked.traceback or (isinstance(e, ModuleNotFoundError) and extra is None):
            raise
        text = " ".join(str(e).split()) + (f": pip install 'diffprune-fast[{extra}]'" if extra else "")
        typer.echo(f"error: {text}", err=True)
        raise typer.Exit(2) from None


def check_out(
    out: Path,
    model_dir: Path | None = None,
    force: bool = False,
    unfinished: str | None = None,
    empties: bool = False,
) -> None:
    """Before anything costs time: a place that can be written to, none of the original's, and nothing in it.

    unfinished: a file that shows that what is there was begun by the same command and broke off. empties: what is there
    will be removed, so it must be a result of ours.
    """
    target = out.resolve()
    if model_dir is not None:
        source = model_dir.resolve()
        source = source.parent if (source.parent / INDEX).exists() else source
        if target.is_relative_to(source):
            raise ValueError(
                f"--out {out} is in the model's own folder {source}: choose another, the original could be lost"
            )
    is_file = bool(out.suffix)
    there = next(path for path in (target, *target.parents) if path.exists())
    if (not there.is_dir() and not (is_file and there == target)) or not os.access(there, os.W_OK):
        raise ValueError(
            f"--out {out}: {there} is {'not writable' if there.is_dir() else 'a file'}, choose another folder"
        )
    taken = target.is_file() or (target.is_dir() and any(target.iterdir()))
    begun = {unfinished, f"{unfinished}.part"}
    if taken and not force and not (unfinished is not None and {p.name for p in target.iterdir()} <= begun):
        raise ValueError(f"--out {out} is there already: choose another, or overwrite it with --force")
    if taken and empties and not any((target / name).is_file() for name in (RUN, RESULT)):
        raise ValueError(f"--out {out} holds other things, which --force would remove: choose another folder")


def command_line(context: typer.Context) -> str:
    """The command of ``context`` with every argument and option that isn't its default, as a shell takes it."""
    words = ["diffprune-fast", str(context.info_name)]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if value is None or value == parameter.get_default(context) or (parameter.multiple and not value):
            continue
        if parameter.param_type_name == "argument":
            words += map(str, value if parameter.nargs != 1 else [value])
        elif getattr(parameter, "is_flag", False):
            words.append(parameter.opts[0])
        else:
            for each in value if parameter.multiple else [value]:
                words += [parameter.opts[0], str(each)]
    return shlex.join(words)


class Ran:
    """What was run: made when a command begins, written when it ends."""

    def __init__(self, context: typer.Context) -> None:
        self.command = command_line(context)
        self._start = time.perf_counter()

    def about(self, **more: Any) -> dict[str, Any]:
        """The command, versions, machine and seconds, as plain JSON values."""
        import torch

        from ..checkpoint.manifest import versions

        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        machine = {"system": platform.system(), "cpu": _cpu() or platform.machine(), "gpu": gpu}
        return {
            "command": self.command,
            "versions": {**versions(), "python": platform.python_version()},
            "machine": machine,
            "seconds": round(time.perf_counter() - self._start, 1),
            **more,
        }

    def write(self, folder: Path, **more: Any) -> None:
        write_json(folder / RUN, self.about(**more))


def _cpu() -> str:
    """The processor's name, where the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` so that the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def emptied(out: Path) -> Path:
    """The folder ``out`` with nothing in it; it went through :func:`check_out`."""
    if out.is_dir():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    return out
