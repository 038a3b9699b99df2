"""Pipelines with pruned components on disk: diffusers' own folders, the pruned component in this package's format."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.building import at_most_modules
from ..checkpoint.errors import CheckpointError
from ..checkpoint.hub import INDEX, folder_of
from ..checkpoint.loading import from_pretrained
from ..checkpoint.manifest import CONFIG, MANIFEST, check_variant, of_variant
from ..checkpoint.reading import check_folder, check_harmless, read_json
from ..checkpoint.replacing import place_of
from ..objective.loss import dtype_of
from .index import is_of_transformers, read_index


def pipeline_from_pretrained(
    directory: str | os.PathLike[str],
    *,
    torch_dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    verify: bool = True,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> Any:
    """Load a pipeline with pruned components, onto ``device`` (None: the CPU).

    No code of the folder is run and nothing outside it is read: classes are those of diffusers and transformers,
    weights are safetensors.

    Args:
        directory: what ``save_pretrained`` of a pruned pipeline, or of its result, wrote; or ``"user/repo"``, which the
            Hugging Face hub has.
        torch_dtype: of all floating-point weights; None is single precision, as in diffusers.
        device: where the pipeline goes.
        verify: see :func:`from_pretrained`.
        subfolder: of the directory or repository.
        revision: of the repository: a branch, a tag or a commit.
        variant: of the weights, such as ``"fp16"``; components that have no such file are loaded from the plain ones.

    Returns:
        The pipeline, of the class that was saved.

    Raises:
        CheckpointError: the folder is no pipeline, is incomplete, or asks for code that isn't installed.
        ValueError: a variant that no file can be named by.

    Example:
        >>> import tempfile
        >>> from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
        >>> from diffprune_fast import score_and_prune
        >>> unet = UNet2DModel(8, block_out_channels=(8, 16), down_block_types=("DownBlock2D",) * 2,
        ...                    up_block_types=("UpBlock2D",) * 2, norm_num_groups=4)
        >>> pipe = DDPMPipeline(unet, DDPMScheduler())
        >>> result = score_and_prune(pipe, None, criterion="magnitude", macs=0.6, round_to=4)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     result.save_pretrained(directory)
        ...     loaded = pipeline_from_pretrained(directory)
        >>> type(loaded).__name__, loaded.unet.num_parameters() == result.after.params
        ('DDPMPipeline', True)
    """
    check_variant(variant)
    directory = folder_of(directory, subfolder, revision, variant, pipelines=True)
    index = read_index(directory)
    check_folder(directory)
    dtype, components = torch_dtype or torch.float32, index.components.items()
    parts = {n: None if c is None else _load(directory, n, c, dtype, verify, variant) for n, c in components}
    try:
        pipe = index.pipeline(**parts, **index.arguments)
        pipe.register_to_config(_name_or_path=str(directory))
    except Exception as e:  # whatever the class makes of components that don't belong together
        raise CheckpointError(f"the pipeline in {directory} can't be put together: {type(e).__name__}: {e}") from e
    return pipe if device is None else pipe.to(device)


def component_folder(directory: Path, name: str, cls: type) -> Path:
    """Where a component of the pipeline in ``directory`` is: in its own folder, or beside the index, where older
    pipelines of one model have everything.

    Raises CheckpointError where it is in neither.
    """
    folder = directory / name
    if folder.is_dir():
        return folder
    own = directory / getattr(cls, "config_name", CONFIG)
    if own.is_file():
        config = read_json(own, directory)
        if isinstance(config, dict) and config.get("_class_name") == cls.__name__:
            return directory
    raise CheckpointError(f"{folder} is missing: copy the whole pipeline")


# Every file that says how a component is made; vocabularies are no configs.
CONFIGS = "*config*.json"


def _load(directory: Path, name: str, cls: Any, dtype: torch.dtype, verify: bool, variant: str | None) -> Any:
    """A component of a pipeline; its class loads it, and gets no chance to look anywhere else."""
    folder = component_folder(directory, name, cls)
    pruned_as = variant if place_of(folder, of_variant(MANIFEST, variant)).is_file() else None
    if place_of(folder, of_variant(MANIFEST, pruned_as)).is_file():
        model = from_pretrained(folder, verify=verify, variant=pruned_as)
        if not isinstance(model, cls):
            raise CheckpointError(f"{folder} holds a {type(model).__name__}, {INDEX} says {cls.__name__}")
        return model if dtype_of(model) == dtype else model.to(dtype)
    of_transformers = is_of_transformers(cls)
    for path in sorted(folder.rglob(CONFIGS)):
        check_harmless(read_json(path, directory), path, code_maps=cls.__module__.startswith("diffusers."))
    options: dict[str, Any] = {"local_files_only": True}
    if issubclass(cls, nn.Module):
        options |= {"torch_dtype": dtype, "use_safetensors": True}
        if variant is not None and any(folder.glob(f"*.{variant}*.safetensors")):
            options["variant"] = variant
    if of_transformers:
        options["trust_remote_code"] = False
    try:
        with warnings.catch_warnings():  # newer versions call it dtype, and say so; older ones don't know that name
            warnings.filterwarnings("ignore", ".*torch_dtype", FutureWarning)
            with at_most_modules():
                return cls.from_pretrained(str(folder), **options)
    except CheckpointError:
        raise
    except Exception as e:  # whatever the class makes of files that aren't its own
        raise CheckpointError(f"{name} in {directory} can't be loaded: {type(e).__name__}: {e}") from e
