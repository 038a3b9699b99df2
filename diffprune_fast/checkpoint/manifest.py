"""``diffprune.json``: what a pruned model's weights can't say by themselves, written and read back with care."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from .errors import CheckpointError
from .reading import read_json
from .replacing import place_of

_log = logging.getLogger(__name__)

# 2 has checksums of the manifest itself and of config.json; what 1 lacks is only that.
FORMAT = 2


MANIFEST = "diffprune.json"


# No layer is as wide; a manifest is read before its claims can be compared with the weights.
MOST_UNITS = 1 << 24


def read_manifest(directory: str | os.PathLike[str], variant: str | None = None) -> dict[str, Any]:
    """The checked contents of ``diffprune.json``, or of a variant's, with ``keep`` as index arrays.

    Raises CheckpointError where it is missing, isn't JSON, or lacks what it must have.
    """
    path = place_of(Path(directory), of_variant(MANIFEST, variant))
    try:
        manifest = read_json(path, Path(directory))
    except FileNotFoundError:
        there = sorted(p.name for p in Path(directory).glob(of_variant(MANIFEST, "*")))
        hint = f" (there is {', '.join(there)}: give variant=)" if there else ""
        raise CheckpointError(
            f"{path} is missing: {Path(directory)} is not a pruned model, or its saving broke off; save it again{hint}"
        ) from None
    _check_format(manifest, path)
    for name, kind in _FIELDS.items():
        if not isinstance(manifest.get(name), kind):
            raise CheckpointError(f"{path}: {name!r} is missing or not a {kind.__name__}; save the model again")
    for name, shape in manifest["shapes"].items():
        if not isinstance(shape, list) or not all(type(s) is int and s >= 0 for s in shape):
            raise CheckpointError(f"{path}: the shape of {name!r} is {shape!r}, not a list of sizes")
    if not all(isinstance(manifest["unpruned"].get(part), dict) for part in ("shapes", "attributes")):
        raise CheckpointError(f"{path}: 'unpruned' lacks shapes or attributes; save the model again")
    manifest["shapes"] = {n: tuple(s) for n, s in manifest["shapes"].items()}
    try:
        widest = max((max(s, default=1) for s in manifest["shapes"].values()), default=0)
        manifest["keep"] = _unpacked(manifest["keep"], widest)
    except (ValueError, TypeError, OverflowError) as e:
        raise CheckpointError(f"{path}: the keep-sets can't be read ({e})") from e
    return manifest


def _check_format(manifest: Any, path: Path) -> None:
    """Raise CheckpointError for another format, and for a manifest that is not as it was written."""
    found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
    if type(found) is not int or not 1 <= found <= FORMAT:
        raise CheckpointError(
            f"{path} has format {found!r}, this version reads 1 to {FORMAT}: use the version that saved it"
        )
    if found == 1:
        _log.warning("%s was saved without checksums of itself and of %s: save the model again", path, CONFIG)
    elif manifest.get("checksum") != checksum_of(manifest):
        raise CheckpointError(
            f"{path} is not as it was written (its checksum differs): copy it or save the model again"
        )


def checksum_of(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest as JSON, whatever its layout, without its own entry."""
    rest = {k: v for k, v in manifest.items() if k != "checksum"}
    try:
        return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    except RecursionError:
        raise CheckpointError("the manifest is nested too deep: copy it or save the model again") from None


def signed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with its checksum."""
    manifest = json.loads(json.dumps(manifest))  # as it will be read
    return {**manifest, "checksum": checksum_of(manifest)}


def _unpacked(keep: Mapping[str, Any], widest: int) -> dict[str, np.ndarray]:
    """Index arrays of all keep-sets, together no larger than a model can be."""
    left, arrays = MOST_UNITS, {}
    for name, runs in keep.items():
        arrays[name] = unpack_runs(runs, min(widest, left))
        left -= len(arrays[name])
    return arrays


_FIELDS = {
    "model_class": str,
    "plan": str,
    "plain_config": bool,
    "tied": dict,
    "shapes": dict,
    "attributes": dict,
    "keep": dict,
    "dropped": dict,
    "tables": dict,
    "unpruned": dict,
    "sha256": dict,
}


def pack_runs(units: np.ndarray) -> list[int]:
    """Sorted indices as ``[start, stop, start, stop, ...]``."""
    units = np.asarray(units, np.int64)
    breaks = np.flatnonzero(np.diff(units) != 1) + 1
    starts = units[np.concatenate([[0], breaks])] if units.size else units
    stops = units[np.concatenate([breaks - 1, [-1]])] + 1 if units.size else units
    return np.stack([starts, stops], axis=1).reshape(-1).tolist()


def unpack_runs(runs: list[int], most: int = MOST_UNITS) -> np.ndarray:
    """The inverse of :func:`pack_runs`.

    Raises ValueError for what isn't a list of rising runs, or names more than ``most`` indices.
    """
    if not isinstance(runs, list) or len(runs) % 2 or not all(type(r) is int for r in runs):
        raise ValueError(f"{str(runs)[:60]} is not a list of runs")
    ends = np.array(runs, np.int64).reshape(-1, 2)
    if (np.diff(ends.reshape(-1)) <= 0).any() or (ends < 0).any():
        raise ValueError(f"the runs {str(runs)[:60]} don't rise")
    if np.diff(ends).sum() > min(most, MOST_UNITS):
        raise ValueError(f"the runs {str(runs)[:60]} name more units than there are channels")
    return np.concatenate([np.arange(a, b) for a, b in ends] or [np.zeros(0, np.int64)])


def versions() -> dict[str, str]:
    import diffusers

    return {"diffprune_fast": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}


WEIGHTS = "diffusion_pytorch_model.safetensors"


# The weights of a model that no config describes. Under its own name diffusers would look for them, build the model of
# the config, and offer to ignore the shapes that differ.
PRUNED_WEIGHTS = "diffprune_model.safetensors"


# What diffusers reads before it looks for weights. Where they have the name above it says that they lie in a file whose
# name is the advice: that is what its error then tells.
SIGNPOST = f"{WEIGHTS}.index.json"


BUFFERS = "diffprune_buffers.safetensors"  # buffers that a state dict leaves out, as the pruned model has them


CONFIG = "config.json"


def of_variant(name: str, variant: str | None) -> str:
    """A file's name for a variant of the weights, as diffusers has it: ``diffprune.fp16.json``."""
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"


def check_variant(variant: str | None) -> None:
    """Raises ValueError for what can't be a part of a file's name."""
    if variant is not None and not (isinstance(variant, str) and re.fullmatch(r"\w+", variant)):
        raise ValueError(f"variant={variant!r}: give letters and digits, such as fp16")


def weights_files(manifest: Mapping[str, Any], variant: str | None = None) -> list[str]:
    """The files that a manifest's weights are in; older versions wrote most of them under diffusers' own name."""
    for name in (of_variant(PRUNED_WEIGHTS, variant), of_variant(WEIGHTS, variant)):
        shard = re.compile(re.escape(name.removesuffix(".safetensors")) + r"(-\d{5}-of-\d{5})?\.safetensors")
        if found := sorted(file for file in manifest["sha256"] if shard.fullmatch(file)):
            return found
    return [of_variant(PRUNED_WEIGHTS if manifest["dropped"] else WEIGHTS, variant)]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
