"""Forwards that can't be followed: what failed, and the line of code in which it did."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch


class TraceError(RuntimeError):
    """The model's forward could not be followed."""


def where_in(module: str, error: BaseException) -> str:
    """Where a forward failed: ``module`` (its name), and the line of code, the last that isn't PyTorch's or ours."""
    inside = f" in {module!r}" if module else ""
    not_theirs = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(not_theirs)]
    if not frames:
        return inside
    path = Path(frames[-1].filename)
    place = "/".join(
        path.parts[path.parts.index("site-packages") + 1 :] if "site-packages" in path.parts else path.parts[-2:]
    )
    source = f": `{frames[-1].line}`" if frames[-1].line else ""
    return f"{inside} at {place}:{frames[-1].lineno}{source}"


def explain_failure(model_class: str, module: str, error: Exception) -> str:
    """What a failed forward means, for its error message."""
    where = where_in(module, error)
    if "meta tensors" in str(error) or isinstance(error, NotImplementedError):
        return (
            f"the forward of {model_class} reads values of an activation, which depends on the data: "
            f"{error}{where}. Give example_inputs for which it takes no such branch, or trace the part of the model "
            "below it."
        )
    return (
        f"the forward of {model_class} failed on the meta device: {error}{where}. Check example_inputs "
        "(shapes and names of the forward's arguments)."
    )
