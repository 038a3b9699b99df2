"""Checkpoints on the Hugging Face hub: which folder of this machine they are in, once they were fetched."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .errors import CheckpointError

# "user/repo"; whatever else is a path.
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# All that a checkpoint has; no code, no pickles.
_FILES = ("*.json", "*.safetensors")


def folder_of(place: str | os.PathLike[str], subfolder: str | None = None, revision: str | None = None) -> Path:
    """The folder that ``place`` is, or that the repository of that name was fetched into; then ``subfolder`` of it.

    Raises CheckpointError where the repository can't be had, or a revision is asked of a folder.
    """
    folder = Path(place)
    if not folder.exists() and isinstance(place, str) and _REPOSITORY.fullmatch(place):
        folder = _fetched(place, subfolder, revision)
    elif revision is not None:
        raise CheckpointError(f"{place} is a folder, which has no revision {revision!r}: leave it out")
    return folder / (subfolder or "")


def _fetched(repository: str, subfolder: str | None, revision: str | None) -> Path:
    import huggingface_hub

    wanted = list(_FILES) if subfolder is None else [f"{subfolder}/{pattern}" for pattern in _FILES]
    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:  # the hub's errors are OSErrors, those of names ValueErrors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"there is no folder {repository}, and the hub doesn't give a repository of that name ({reason})"
        ) from error
