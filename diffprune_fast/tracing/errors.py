"""Forwards that can't be followed: what failed, and the line of code in which it did."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from .walk import Walk


class TraceError(RuntimeError):
    """The model's forward could not be followed."""


def where_in(walk: Walk, error: BaseException) -> str:
    """The module in which a forward failed, and the line of its code: the last one that isn't PyTorch's or ours."""
    module = f" in {walk.stack[-1]!r}" if walk.stack and walk.stack[-1] else ""
    not_theirs = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(not_theirs)]
    if not frames:
        return module
    path = Path(frames[-1].filename)
    place = "/".join(
        path.parts[path.parts.index("site-packages") + 1 :] if "site-packages" in path.parts else path.parts[-2:]
    )
    return f"{module} at {place}:{frames[-1].lineno}: {frames[-1].line}"


def explained(model: nn.Module, walk: Walk, error: Exception) -> str:
    """What a failed forward means, for its error message."""
    where = where_in(walk, error)
    if "meta tensors" in str(error) or isinstance(error, NotImplementedError):
        return (
            f"the forward of {type(model).__name__} reads values of an activation, which depends on the data: "
            f"{error}{where}. Give example_inputs for which it takes no such branch, or trace the part of the model "
            "below it."
        )
    return (
        f"the forward of {type(model).__name__} failed on the meta device: {error}{where}. Check example_inputs "
        "(shapes and names of the forward's arguments)."
    )
