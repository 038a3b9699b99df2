"""Checkpoints on the Hugging Face hub: which folder of this machine they are in, once they were fetched."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .errors import CheckpointError
from .reading import read_json

INDEX = "model_index.json"  # of a pipeline

# "user/repo"; whatever else is a path.
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# All that a checkpoint has; no code, no pickles. Vocabularies are text, or what sentencepiece reads.
_OF_MODELS = ("config.json", "diffprune.json", "diffprune.*.json", "diffusion_pytorch_model.safetensors.index*.json")
_BESIDE_MODELS = (INDEX, "scheduler_config.json", "scheduler/scheduler_config.json")
_OF_COMPONENTS = ("*.json", "*.txt", "*.model")
_WEIGHTS = ("diffusion_pytorch_model", "diffprune_model", "diffprune_buffers", "model")


def folder_of(
    place: str | os.PathLike[str],
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    pipelines: bool = False,
) -> Path:
    """The folder that ``place`` is, or that the repository of that name was fetched into; then ``subfolder`` of it.

    variant: of the weights that are fetched; the plain ones come where a component has no such. pipelines: fetches a
    pipeline's components too. Raises CheckpointError where the repository can't be had, or a revision is asked of a
    folder.
    """
    folder = Path(place)
    if not folder.exists() and isinstance(place, str) and _REPOSITORY.fullmatch(place):
        folder = _fetched(place, f"{subfolder}/" if subfolder else "", revision, variant, pipelines)
    elif revision is not None:
        what = "a folder, which" if folder.exists() else "neither a folder nor a name on the hub (user/repo): it"
        raise CheckpointError(f"{place} is {what} has no revision {revision!r}: leave it out")
    return folder / (subfolder or "")


def _fetched(repository: str, top: str, revision: str | None, variant: str | None, pipelines: bool) -> Path:
    parts = _components(_snapshot(repository, revision, [top + INDEX]), top) if pipelines else []
    folders = [top, *(f"{top}{name}/" for name in parts)]
    wanted = [top + name for name in (*_OF_MODELS, *_BESIDE_MODELS)]
    wanted += [folder + pattern for folder in folders[1:] for pattern in _OF_COMPONENTS]
    found = _snapshot(repository, revision, wanted + _weights(folders, variant))
    if variant is not None:
        without = [folder for folder in folders if not any((found / folder).glob("*.safetensors"))]
        found = _snapshot(repository, revision, wanted + _weights(folders, variant) + _weights(without, None))
    return found


def _weights(folders: list[str], variant: str | None) -> list[str]:
    """Patterns of one file, and of its shards, for all names that weights have."""
    of_variant = "" if variant is None else f".{variant}"
    names = [f"{stem}{of_variant}{shards}.safetensors" for stem in _WEIGHTS for shards in ("", "-*")]
    return [folder + name for folder in folders for name in names]


def _components(root: Path, top: str) -> list[str]:
    """The folders that a pipeline's index names; none where there is no index."""
    path = root / top / INDEX
    try:
        index = read_json(path, root)
    except FileNotFoundError:
        return []
    if not isinstance(index, dict):
        raise CheckpointError(f"{path} is no index of a pipeline: copy it or save it again")
    return [name for name, value in index.items() if isinstance(value, list) and name.isidentifier()]


def _snapshot(repository: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # the hub's errors are OSErrors, those of names ValueErrors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"there is no folder {repository}, and the hub doesn't give a repository of that name ({reason})"
        ) from error
