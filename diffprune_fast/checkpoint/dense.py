"""Models in folders, pruned or not: none of them is trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..architectures.configs import build_on_meta
from .building import at_most_modules
from .loading import diffusers_class, from_pretrained
from .manifest import CONFIG, MANIFEST
from .reading import check_folder, check_harmless, read_json
from .replacing import place_of


def model_in(folder: Path, weights: bool = True) -> nn.Module:
    """The pruned model in ``folder``, or the one that diffusers saved there; no code of the folder runs.

    weights: False builds the latter on ``meta``, without reading its weights. Raises ValueError where there is no
    model, or not all of its weights; CheckpointError for a folder that is damaged or hostile.
    """
    if place_of(folder, MANIFEST).exists():
        return from_pretrained(folder)
    config = read_config(folder / CONFIG)
    cls: Any = diffusers_class(config["_class_name"])
    check_folder(folder)
    with at_most_modules():
        if not weights:
            return build_on_meta(cls, config)
        model, found = cls.from_pretrained(
            folder, output_loading_info=True, use_safetensors=True, local_files_only=True
        )
    if found["missing_keys"] or found["mismatched_keys"]:
        wrong = [*found["missing_keys"], *map(str, found["mismatched_keys"])]
        raise ValueError(f"the weights in {folder} lack {wrong[0]} ({len(wrong)} in all): they are of another model")
    return model


def read_config(path: Path) -> dict[str, Any]:
    """A config of diffusers, which names its class and nothing that would be fetched or run."""
    try:
        config = read_json(path, path.parent)
    except FileNotFoundError:
        inside = sorted(other.parent.name for other in path.parent.glob(f"*/{path.name}"))
        hint = f"; there are {', '.join(inside)} in it" if inside else ""
        raise ValueError(f"{path} is missing: {path.parent} is not a folder of a model of diffusers{hint}") from None
    check_harmless(config, path)
    if not isinstance(config, dict) or not isinstance(config.get("_class_name"), str):
        raise ValueError(f"{path} names no class (_class_name): it is not a config of diffusers")
    return config
