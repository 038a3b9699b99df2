"""Saving and loading pruned models: safetensors and JSON, nothing that runs.

A directory holds the weights, ``config.json`` (the model's config) and ``diffprune.json`` (the manifest: shapes,
keep-sets, how they came to be). Where a plain config describes the pruned model, ``config.json`` is that one, the
weights are in ``diffusion_pytorch_model.safetensors`` and the class's own ``from_pretrained`` reads the directory.
Where none does they are in ``diffprune_model.safetensors``, which other tools don't look for, and a signpost has their
error name the function that does.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ..architectures.attached import adapters
from ..architectures.configs import build_on_meta, own_config, shapes_of
from ..objective.shards import fsdp_modules, whole_model
from ..pruned.kept_columns import kept_columns
from ..pruned.passthrough import dropped_blocks
from ..pruned.record import changed_since, record_of
from .building import check_finite
from .errors import ADVICE, CheckpointError
from .manifest import (
    BUFFERS,
    CONFIG,
    FORMAT,
    MANIFEST,
    PRUNED_WEIGHTS,
    SIGNPOST,
    WEIGHTS,
    _sha256,
    check_variant,
    of_variant,
    pack_runs,
    signed,
    versions,
)
from .plain_config import changed_attributes, is_own_config, plain_config
from .replacing import FileSet, replace_files


def files_of(variant: str | None) -> FileSet:
    """diffusers' own loaders read the weights by the config. Shards' names say how many there are."""
    first, *rest = (of_variant(name, variant) for name in (MANIFEST, BUFFERS, SIGNPOST))
    weights = [of_variant(name, variant) for name in (WEIGHTS, PRUNED_WEIGHTS)]
    shards = [f"{name.removesuffix('.safetensors')}-*.safetensors" for name in weights]
    return FileSet(first=first, describes=CONFIG, last=(*weights, *shards), others=tuple(rest))


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    variant: str | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Write a pruned model with its record into ``directory``, which is made if need be.

    A save that breaks off, at whatever moment, leaves the former checkpoint or the new one.

    Args:
        model: a model that was pruned, or had blocks dropped: it carries its record. One that FSDP2 has sharded is
            gathered for it in the first rank's memory: all ranks call this, the first one writes.
        directory: where ``config.json`` (of a diffusers model), ``diffprune.json`` and the safetensors go.
        variant: a part of the files' names, such as ``"fp16"``: beside the plain ones they are another checkpoint.
        max_shard_size: the most bytes of a file of weights, also ``"5GB"``; None writes one.

    Returns:
        None: :func:`from_pretrained` gives the model back.

    Raises:
        ValueError: a variant that no file can be named by.
        CheckpointError: the model has no memory (``meta``), NaN or infinite weights, or state that isn't tensors.
        OSError: from the disk.

    Example:
        >>> import tempfile
        >>> from diffprune_fast import score_and_prune
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> x = (torch.zeros(1, 4),)
        >>> result = score_and_prune(model, None, criterion="magnitude", ratio=0.5, example_inputs=x)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save(model, directory)
        ...     sorted(path.name for path in Path(directory).iterdir())
        ['diffprune.json', 'diffprune_model.safetensors']
    """
    check_variant(variant)
    gathered = whole_model(model)
    if gathered is not None:
        _write(gathered, record_of(gathered).about, Path(directory), variant, max_shard_size)


class SaveAsPruned:
    """``save_pretrained`` of a pruned module: diffusers' own would write the config of the widths before pruning."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        *,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        **options: Any,
    ) -> None:
        """Write the module as :func:`save` does; with further options of diffusers as its class does.

        Raises ValueError for such options where the model's config doesn't describe it.
        """
        how: Any = {"variant": variant} | ({} if max_shard_size is None else {"max_shard_size": max_shard_size})
        wanted = {k for k, v in options.items() if v is not None and (k, v) not in _AS_IT_IS}
        if wanted and is_own_config(self.model):  # nothing but an ordinary model of its class
            type(self.model).save_pretrained(self.model, save_directory, is_main_process, **how, **options)  # type: ignore
            return
        if wanted:
            raise ValueError(f"a pruned {type(self.model).__name__} is saved as safetensors, without {wanted}")
        if is_main_process or fsdp_modules(self.model):
            save(self.model, save_directory, **how)


def replace_save_pretrained(model: nn.Module) -> None:
    """From now on a diffusers model is saved as a pruned one also by its own ``save_pretrained``."""
    if hasattr(model, "save_config"):
        model.save_pretrained = SaveAsPruned(model)  # type: ignore[assignment]


# Options of diffusers' save_pretrained that ask for what is done anyway.
_AS_IT_IS = (("safe_serialization", True), ("push_to_hub", False), ("use_flashpack", False))


def _write(
    model: nn.Module,
    record: Mapping[str, Any],
    directory: Path,
    variant: str | None,
    max_shard_size: int | str | None,
) -> None:
    layers = adapters(model)
    if layers:
        raise CheckpointError(
            f"{len(layers)} layers have adapters ({layers[0]}), which this format doesn't hold: save them apart "
            "(save_lora_adapter), take them off (unload_lora, or peft's merge_and_unload) and save the model then"
        )
    weights, tied, files = *_weights(model), files_of(variant)
    check_finite(model.named_parameters())
    buffers = {n: b.detach().contiguous() for n, b in model.named_buffers() if n not in weights and n not in tied}
    is_diffusers = hasattr(model, "save_config") and hasattr(model, "config")
    dropped = dropped_blocks(model)
    plain = plain_config(model) if not dropped else None
    manifest = {
        **record,
        "format": FORMAT,
        "versions": versions(),
        "model_class": type(model).__name__,
        "plain_config": plain is not None,
        "tied": tied,
        "shapes": {name: list(t.shape) for name, t in sorted({**weights, **buffers}.items())},
        "dropped": dropped,
        "tables": {name: [t.width, pack_runs(t.kept.numpy())] for name, t in kept_columns(model).items()},
        "unpruned": _unpruned(model) if plain is None else {"shapes": shapes_of(model), "attributes": {}},
        "attributes": {} if plain is not None else _attributes(model, record.get("attributes", {}), is_diffusers),
    }

    def write(folder: Path) -> None:
        name, index = (of_variant(n, variant) for n in (PRUNED_WEIGHTS if plain is None else WEIGHTS, SIGNPOST))
        _save_weights(weights, folder, name, index, max_shard_size)
        if buffers:
            save_file(buffers, folder / of_variant(BUFFERS, variant), metadata={"format": "pt"})
        if is_diffusers:
            of_config = build_on_meta(type(model), plain) if plain is not None else model
            if plain is not None:  # also what others noted in it: diffusers' moving average keeps its numbers there
                of_config.register_to_config(**plain)  # type: ignore[operator]
            of_config.save_config(folder)  # type: ignore[operator]
            if plain is None:
                _put_signposts(folder, index)
        whole = signed({**manifest, "sha256": {p.name: _sha256(p) for p in sorted(folder.iterdir())}})
        first = folder / files.first
        first.write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        for path in folder.iterdir():
            shutil.copymode(first, path)  # safetensors makes files that others can't read

    replace_files(directory, files, write)


def _save_weights(
    weights: dict[str, torch.Tensor], folder: Path, name: str, index: str, most: int | str | None
) -> None:
    """One file, or shards of at most ``most`` bytes with an index as diffusers reads it."""
    if most is None:
        return save_file(weights, folder / name, metadata={"format": "pt"})
    from huggingface_hub import split_torch_state_dict_into_shards

    pattern = f"{name.removesuffix('.safetensors')}{{suffix}}.safetensors"
    parts = split_torch_state_dict_into_shards(weights, filename_pattern=pattern, max_shard_size=most)
    for file, names in parts.filename_to_tensors.items():
        save_file({n: weights[n] for n in names}, folder / file, metadata={"format": "pt"})
    if parts.is_sharded:
        found = {"metadata": parts.metadata, "weight_map": parts.tensor_to_filename}
        (folder / index).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _put_signposts(written: Path, name: str) -> None:
    """Have config.json say how the model is loaded, and diffusers' ``from_pretrained`` too, in its error."""
    path = written / CONFIG
    config = {**json.loads(path.read_text(encoding="utf-8")), "_diffprune_fast": ADVICE}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    index = {"metadata": {"total_size": 0}, "weight_map": {"": ADVICE}}
    (written / name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _weights(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The state dict without repetitions, and for each name left out the one that stands for it."""
    weights: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    used: set[int] = set()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{name} is {type(tensor).__name__}: only tensors can be saved without pickle")
        if tensor.is_meta:
            raise CheckpointError(f"{name} is on the meta device: there are no weights to save")
        storage = tensor.untyped_storage().data_ptr()
        same = (storage, tensor.device, tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and same in first:
            tied[name] = first[same]
            continue
        first[same] = name
        # Different views of one storage are saved as what they are now, each with its own copy.
        weights[name] = tensor.contiguous() if storage not in used else tensor.contiguous().clone()
        used.add(storage)
    return weights, tied


def _unpruned(model: nn.Module) -> dict[str, Any]:
    record = record_of(model)
    return {"shapes": record.shapes, "attributes": record.attributes}


def _attributes(model: nn.Module, known: Mapping[str, Any], is_diffusers: bool) -> dict[str, Any]:
    """What a freshly built model lacks, also where it was pruned before and ``known`` is of the last time only."""
    attributes = {**known, **changed_since(model)}
    if is_diffusers:
        attributes.update(changed_attributes(model, build_on_meta(type(model), own_config(model))))
    return {n: list(v) if isinstance(v, tuple) else v for n, v in sorted(attributes.items())}
