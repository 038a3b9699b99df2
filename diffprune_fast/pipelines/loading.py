"""Pipelines with pruned components on disk: diffusers' own folders, the pruned component in this package's format."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.loading import from_pretrained
from ..checkpoint.manifest import MANIFEST, CheckpointError
from ..objective.loss import dtype_of

INDEX = "model_index.json"


def pipeline_from_pretrained(
    directory: str | os.PathLike[str],
    *,
    torch_dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    verify: bool = True,
) -> Any:
    """Load a pipeline with pruned components, onto ``device`` (None: the CPU).

    torch_dtype: of all floating-point weights; None is single precision, as in diffusers. verify: see
    :func:`from_pretrained`. No code of the folder is run: classes are those of diffusers and transformers, weights are
    safetensors.

    Raises CheckpointError for a folder that is no pipeline, is incomplete, or asks for anything else.
    """
    import diffusers

    directory = Path(directory)
    index = read_index(directory)
    dtype = torch_dtype or torch.float32
    parts = {name: directory / name for name in index if (directory / name / MANIFEST).is_file()}
    pruned: dict[str, Any] = {name: from_pretrained(p, verify=verify) for name, p in parts.items()}
    for model in pruned.values():
        if dtype_of(model) != dtype:
            model.to(dtype)
    try:
        with warnings.catch_warnings():  # newer versions call it dtype, and say so; older ones don't know that name
            warnings.filterwarnings("ignore", ".*torch_dtype", FutureWarning)
            pipe = getattr(diffusers, index["_class_name"]).from_pretrained(
                str(directory), torch_dtype=dtype, use_safetensors=True, local_files_only=True, **pruned
            )
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as e:
        raise CheckpointError(f"the pipeline in {directory} can't be loaded: {e}") from e
    return pipe if device is None else pipe.to(device)


def read_index(directory: Path) -> dict[str, Any]:
    """The contents of ``model_index.json``, which may name classes of diffusers and transformers only.

    Raises CheckpointError.
    """
    import diffusers

    path = directory / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {directory} is no pipeline (one model: from_pretrained)") from None
    except (ValueError, OSError) as e:
        raise CheckpointError(f"{path} can't be read ({e}): save the pipeline again") from e
    name = index.get("_class_name") if isinstance(index, dict) else None
    cls = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not isinstance(cls, type) or not issubclass(cls, diffusers.DiffusionPipeline):
        raise CheckpointError(f"{path} names {name!r}, which is no pipeline of diffusers {diffusers.__version__}")
    for component, value in index.items():
        if isinstance(value, list) and value != [None, None] and not _is_known(value, directory / component):
            raise CheckpointError(f"{path}: {component} is {value!r}, no class of diffusers or transformers")
    return index


def _is_known(value: list[Any], folder: Path) -> bool:
    """Whether ``[library, class]`` is code that is installed; diffusers would also run a module of the folder."""
    import diffusers

    if len(value) != 2 or not all(isinstance(v, str) and v.isidentifier() for v in value):
        return False
    library, name = value
    # These look for a class in the folder's config, and may ask the user whether to run it.
    automatic = name == "AutoModel" or (library == "transformers" and name.startswith("Auto"))
    installed = library in ("diffusers", "transformers") or hasattr(diffusers.pipelines, library)
    return installed and not automatic and not (folder / f"{library}.py").exists()
