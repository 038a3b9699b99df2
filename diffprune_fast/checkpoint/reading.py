"""Files of a checkpoint, which isn't trusted: ordinary ones inside its folder, of bounded size and depth."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import ADVICE, CheckpointError

# A manifest of a model with 10,000 parameters has 4 MB.
MOST_BYTES = 64 << 20

# Of a folder that is walked before it is read, and of lists in lists.
MOST_FILES = 10_000
MOST_DEPTH = 16

# The longest lists in configs are sigmas, one per timestep, and labels, one per class.
MOST_ENTRIES = 1 << 16

# The largest number in configs is the size of a vocabulary, 262,208.
MOST_NUMBER = 1 << 24

# What a config tells loaders to fetch or to import, and the plain values that it may have.
_ATTENTION = ("attn_implementation", "_attn_implementation", "experts_implementation")
_QUANTIZERS = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")


def check_file(path: Path, root: Path) -> None:
    """Raise CheckpointError unless ``path`` is an ordinary file, and not one outside ``root`` that it links to.

    The hub's cache is a folder of links; those into its own ``blobs`` are followed. FileNotFoundError is left to the
    caller.
    """
    found = path.resolve(strict=True)
    if not _is_inside(found, root.resolve()):
        raise CheckpointError(f"{path} is a link to {found}, outside of {root}: copy that file into the folder")
    if not stat.S_ISREG(os.stat(found).st_mode):
        raise CheckpointError(f"{path} is no ordinary file: a checkpoint has nothing else")


def _is_inside(found: Path, root: Path) -> bool:
    if found.is_relative_to(root):
        return True
    snapshots = next((p for p in (root, *root.parents) if p.name == "snapshots"), None)
    return snapshots is not None and found.parent == snapshots.parent / "blobs"


def read_json(path: Path, root: Path) -> Any:
    """The contents of a JSON file of the checkpoint in ``root``, none of it deep or huge.

    Raises CheckpointError; FileNotFoundError where there is no such file.
    """
    try:
        check_file(path, root)
        with path.open("rb") as f:
            content = f.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise CheckpointError(f"{path} has more than {MOST_BYTES >> 20} MiB: it is not what it should be")
        return json.loads(content.decode("utf-8"))
    except FileNotFoundError:
        raise
    except (ValueError, OSError, RecursionError, MemoryError) as e:
        what = "nested too deep" if isinstance(e, RecursionError) else e
        raise CheckpointError(f"{path} can't be read ({what}): copy it or save it again") from e


def check_config(config: Any, path: Path) -> None:
    """Raise CheckpointError for numbers, lists and depths that no config has, before anything is built from it."""
    for depth, key, value in _walk(config):
        if depth > MOST_DEPTH:
            raise CheckpointError(f"{path} is nested {depth} deep: it is not a config")
        if isinstance(value, (dict, list)) and len(value) > MOST_ENTRIES:
            raise CheckpointError(f"{path}: {key} has {len(value)} entries: it is not a config")
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) > MOST_NUMBER:
            raise CheckpointError(f"{path}: {key} is {value}: no model is as large")


def check_harmless(config: Any, path: Path, code_maps: bool = False) -> None:
    """Raise CheckpointError where a component's config asks for code, or names another place to load from.

    code_maps: lets ``auto_map`` pass, for classes that never look at it.
    """
    check_config(config, path)
    for _, key, value in _walk(config):
        if key == "auto_map" and not code_maps:
            raise CheckpointError(
                f"{path} has an auto_map, which names code: no code of a checkpoint is run; delete the entry if the "
                "class is one of the library's own"
            )
        if key in _ATTENTION and not _is_plain_name(value):
            raise CheckpointError(f"{path}: {key} is {value!r}, which would be fetched and run: delete the entry")
        if key == "quantization_config" and value is not None:
            method = value.get("quant_method") if isinstance(value, dict) else value
            if method not in _QUANTIZERS:
                raise CheckpointError(f"{path}: quantization_config asks for {method!r}: give the model unquantized")


def _is_plain_name(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain_name(v) for v in value.values())
    return value is None or (isinstance(value, str) and value.isidentifier())


def _walk(config: Any) -> Iterator[tuple[int, str, Any]]:
    """Depth, nearest key and value of everything in a structure of JSON; no recursion, as depth is what is checked."""
    left = [(1, "its top", config)]
    while left:
        depth, key, value = left.pop()
        yield depth, key, value
        if isinstance(value, dict):
            left += [(depth + 1, str(k), v) for k, v in value.items()]
        elif isinstance(value, list):
            left += [(depth + 1, key, v) for v in value]


def check_folder(folder: Path, root: Path | None = None) -> None:
    """Raise CheckpointError for a folder, of a model or a pipeline, that loaders can't be let into.

    No links out of ``root`` (None: the folder), nothing but files and folders, no weights that are pickled, no adapters
    of other models. What begins with a dot is nobody's part.
    """
    root = folder if root is None else root
    left, seen = [folder], 0
    while left:
        try:
            entries = [e for e in os.scandir(left.pop()) if not e.name.startswith(".")]
        except OSError as e:
            raise CheckpointError(f"{folder} can't be read ({e})") from e
        seen += len(entries)
        if seen > MOST_FILES:
            raise CheckpointError(f"{folder} has more than {MOST_FILES} files: it is not a model's folder")
        for entry in entries:
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                left.append(path)
            else:
                _check_entry(path, root)


def _check_entry(path: Path, root: Path) -> None:
    try:
        if path.is_dir():
            # It is a link, and what it leads to is walked where it is.
            if not path.resolve().is_relative_to(root.resolve()):
                raise CheckpointError(f"{path} is a link to {path.resolve()}, outside of {root}: copy that folder")
            return
        check_file(path, root)
    except (OSError, RuntimeError) as e:
        if isinstance(e, CheckpointError):
            raise
        raise CheckpointError(f"{path} can't be followed ({e}): copy it again") from e
    if path.name == "adapter_config.json":
        raise CheckpointError(f"{path} makes loaders look for another model: merge the adapter and save the model")
    if ".safetensors.index." in path.name:  # of a variant too; lists of pickles are not looked at by anybody
        _check_shards(path, root)


def _check_shards(path: Path, root: Path) -> None:
    index = read_json(path, root)
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict):
        raise CheckpointError(f"{path} lists no weights: copy it again")
    for shard in shards.values():
        if shard == ADVICE:
            continue
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{path} names {shard!r}: weights are safetensors files beside it")
