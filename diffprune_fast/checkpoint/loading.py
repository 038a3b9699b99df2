"""Loading pruned models: nothing of the checkpoint runs, every part is checked before it is used."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..architectures.configs import build_on_meta, shapes_of
from ..architectures.position_tables import table_of
from ..pruned.held_tensors import owner_of, tables
from ..pruned.kept_columns import KeptColumns
from ..pruned.passthrough import drop_again
from ..pruned.record import Record, attach_record, from_json, is_settable
from .building import MOST_MODULES, at_most_modules, check_finite, check_positions, numbers_in
from .errors import CheckpointError
from .hub import INDEX, folder_of
from .manifest import (
    BUFFERS,
    CONFIG,
    MANIFEST,
    _sha256,
    check_variant,
    of_variant,
    pack_runs,
    read_manifest,
    unpack_runs,
    weights_files,
)
from .reading import check_file, check_harmless, read_json
from .replacing import place_of
from .saving import replace_save_pretrained


def from_pretrained(
    directory: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    torch_dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    verify: bool = True,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> nn.Module:
    """Load a pruned model, in evaluation mode, onto ``device`` (None: the CPU).

    No code of the checkpoint is run: weights are safetensors, the class is one of diffusers' models or the caller's.

    Args:
        directory: what ``save_pretrained`` wrote; or ``"user/repo"``, which the Hugging Face hub has.
        model: for classes outside diffusers, an instance of the unpruned architecture (on any device; it isn't
            changed); classes of diffusers are built from ``config.json``.
        torch_dtype: of the floating-point weights; None keeps what was saved.
        device: where the model goes.
        verify: compare the weights' SHA-256 with the manifest; False for weights replaced on purpose.
        subfolder: of the directory or repository.
        revision: of the repository: a branch, a tag or a commit.
        variant: that it was saved as, such as ``"fp16"``.

    Returns:
        The pruned model; its own ``save_pretrained`` writes the same format again.

    Raises:
        CheckpointError: something is missing, cut short or contradictory.
        ValueError: a variant that no file can be named by.

    Example:
        >>> import tempfile
        >>> from diffprune_fast import score_and_prune
        >>> def dense():
        ...     return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> x = (torch.zeros(1, 4),)
        >>> result = score_and_prune(dense(), None, criterion="magnitude", ratio=0.5, example_inputs=x)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     result.save_pretrained(directory)
        ...     loaded = from_pretrained(directory, dense())
        >>> loaded[0]
        Linear(in_features=4, out_features=8, bias=True)
    """
    check_variant(variant)
    directory = folder_of(directory, subfolder, revision, variant)
    try:
        shaped = _loaded(directory, model, verify, variant)
    except CheckpointError:
        raise
    except Exception as e:  # a manifest that is well formed and nonsense fails wherever it is first believed
        raise CheckpointError(f"{directory} can't be loaded ({type(e).__name__}: {e}): save the model again") from e
    if torch_dtype is not None:
        shaped.to(torch_dtype)
    if device is not None:
        shaped.to(device)
    _align(shaped)
    replace_save_pretrained(shaped)
    return shaped.eval()


# What PyTorch's own allocator gives. A file's mapping has tensors anywhere, which some kernels are slower with, and
# round in another order than they did with the model that was saved.
_ALIGNMENT = 64


def _align(model: nn.Module) -> None:
    """Give tensors that lie in the file's mapping, off a boundary, memory of their own; ties stay."""
    for _, _, _, t in tables(model):
        if t.device.type == "cpu" and t.data_ptr() % _ALIGNMENT:
            t.data = t.detach().clone()


def _loaded(directory: Path, model: nn.Module | None, verify: bool, variant: str | None) -> nn.Module:
    if (directory / INDEX).exists():
        raise CheckpointError(f"{directory} is a whole pipeline: load it with pipeline_from_pretrained")
    manifest = read_manifest(directory, variant)
    state: dict[str, torch.Tensor] = {}
    for name in weights_files(manifest, variant):
        state |= _read_tensors(directory, name, manifest, verify)
    unsaved = of_variant(BUFFERS, variant)
    buffers = _read_tensors(directory, unsaved, manifest, verify) if unsaved in manifest["sha256"] else {}
    _check_names({**state, **buffers}, manifest)
    check_finite(state.items())

    shaped, real = _empty_model(directory, manifest, model)
    if model is not None:
        check_unpruned(shaped, manifest["unpruned"])
    attach_record(shaped, _record(manifest))
    _apply(shaped, manifest)
    _load(shaped, state, buffers, manifest["tied"])
    _attach_tables(shaped, manifest["tables"])
    _fill_tensor_attributes(shaped, real)
    return shaped


# What a manifest says about the files beside it, not about how the model was pruned.
_OF_THE_FILES = (
    "format",
    "versions",
    "model_class",
    "plain_config",
    "tied",
    "shapes",
    "dropped",
    "tables",
    "unpruned",
    "sha256",
    "checksum",
)


def _record(manifest: Mapping[str, Any]) -> Record:
    """The record of a module that was loaded: it is saved again with what it came with."""
    about = {k: v for k, v in manifest.items() if k not in _OF_THE_FILES}
    about["keep"] = {name: pack_runs(units) for name, units in manifest["keep"].items()}
    return Record(manifest["unpruned"]["shapes"], manifest["unpruned"]["attributes"], about)


def _read_tensors(directory: Path, name: str, manifest: Mapping[str, Any], verify: bool) -> dict[str, torch.Tensor]:
    path = place_of(directory, name)
    try:
        check_file(path, directory)
        with safe_open(path, framework="pt") as f:
            tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: copy the whole directory, or save the model again") from None
    except (SafetensorError, OSError, ValueError) as e:
        raise CheckpointError(f"{path} is cut short or damaged ({e}): copy it or save the model again") from e
    if verify and manifest["sha256"].get(name) != _sha256(path):
        raise CheckpointError(
            f"{path} is not the file that {MANIFEST} was saved with (its SHA-256 differs): save the model again, or "
            "pass verify=False if you replaced the weights on purpose"
        )
    return tensors


def _check_names(tensors: Mapping[str, torch.Tensor], manifest: Mapping[str, Any]) -> None:
    expected = manifest["shapes"]
    for what, names in (("lack", expected.keys() - tensors.keys()), ("also hold", tensors.keys() - expected.keys())):
        if names:
            raise CheckpointError(f"the weights {what} {_listed(names)}, unlike {MANIFEST}: save the model again")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise CheckpointError(
                f"{name} is {tuple(tensor.shape)} in the weights and {expected[name]} in {MANIFEST}: save it again"
            )


def _listed(names: Any) -> str:
    names = sorted(names)
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _empty_model(
    directory: Path, manifest: Mapping[str, Any], model: nn.Module | None
) -> tuple[nn.Module, nn.Module | None]:
    """The unpruned model on ``meta``, and where to find tensors that are neither parameters nor buffers."""
    name = manifest["model_class"]
    if model is not None:
        if type(model).__name__ != name:
            raise CheckpointError(f"{directory} holds a {name}, the given model is a {type(model).__name__}")
        return copy.deepcopy(model, {id(t): _without_memory(t) for t in [*model.parameters(), *model.buffers()]}), None
    path = place_of(directory, CONFIG)
    try:
        config = read_json(path, directory)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: pass model=, an unpruned {name}, for a class outside diffusers"
        ) from None
    if not isinstance(config, dict) or config.get("_class_name") != name:
        raise CheckpointError(f"{path} is not the config of a {name}, which {MANIFEST} names")
    if manifest["format"] > 1 and manifest["sha256"].get(CONFIG) != _sha256(path):
        raise CheckpointError(
            f"{path} is not the file that {MANIFEST} was saved with (its SHA-256 differs): save the model again"
        )
    check_harmless(config, path)
    check_positions(config)
    cls = diffusers_class(name)
    most = 16 * len(manifest["unpruned"]["shapes"]) + MOST_MODULES // 100
    try:
        with at_most_modules(most):
            empty = build_on_meta(cls, config)
            has_tensors = any(isinstance(v, torch.Tensor) for m in empty.modules() for v in vars(m).values())
            if has_tensors and numbers_in(empty) > MOST_TIMES_LARGER * _numbers(manifest):
                raise CheckpointError(f"{path} describes a model far larger than its weights: it is damaged")
            return empty, cls.from_config(config) if has_tensors else None  # type: ignore[attr-defined]
    except CheckpointError:
        raise
    except Exception as e:  # whatever the class makes of a config that isn't its own
        raise CheckpointError(f"{name} can't be built from {path}: {type(e).__name__}: {e}") from e


# A model whose every width was halved is four times smaller.
MOST_TIMES_LARGER = 10_000


def _numbers(manifest: Mapping[str, Any]) -> int:
    return sum(math.prod(shape) for shape in manifest["shapes"].values())


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def diffusers_class(name: str) -> type:
    """A model class that diffusers exports. Raises CheckpointError for any other name."""
    import diffusers

    cls = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not isinstance(cls, type) or not issubclass(cls, diffusers.ModelMixin) or name.startswith("_"):
        raise CheckpointError(
            f"{name!r} is not a model of diffusers {diffusers.__version__}: pass model=, an unpruned instance"
        )
    return cls


def _apply(model: nn.Module, manifest: Mapping[str, Any]) -> None:
    """Give the empty model the shapes and attributes of the manifest, which isn't trusted."""

    try:
        drop_again(model, manifest["dropped"])
    except (ValueError, AttributeError) as e:
        raise CheckpointError(f"{MANIFEST} drops blocks that {manifest['model_class']} can't do without: {e}") from e
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    expected = {**manifest["shapes"], **{a: manifest["shapes"].get(b) for a, b in manifest["tied"].items()}}
    for what, some in (("lacks", expected.keys() - names.keys()), ("also has", names.keys() - expected.keys())):
        if some:
            raise CheckpointError(
                f"{manifest['model_class']} {what} {_listed(some)}, unlike the checkpoint, which was saved with "
                f"{manifest.get('versions')}: install those versions"
            )
    shapes = {n: expected[n] for n in tensors}
    for name, shape in shapes.items():
        old = tuple(tensors[name].shape)
        if shape is None or len(shape) != len(old) or any(not 0 <= s <= o for s, o in zip(shape, old, strict=True)):
            raise CheckpointError(f"{MANIFEST} gives {name} the shape {shape}, the unpruned model has {old}")
    attributes = {n: _checked_attribute(model, n, v) for n, v in manifest["attributes"].items()}
    apply_shapes(model, {n: s for n, s in shapes.items() if s != tuple(tensors[n].shape)}, attributes)


def _checked_attribute(model: nn.Module, name: str, value: Any) -> Any:
    value = tuple(value) if isinstance(value, list) else value
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise CheckpointError(f"{MANIFEST} sets {name}, but the model has no module {path!r}") from None
    old = vars(module).get(leaf, model)
    if leaf.startswith("_") or not (old is None or isinstance(old, bool) or is_settable(old)):
        raise CheckpointError(f"{MANIFEST} sets {name}, which follows no width in {type(module).__name__}")
    if not (is_settable(value) or isinstance(value, bool)):
        raise CheckpointError(f"{MANIFEST} sets {name} to {value!r}: only numbers and tuples of integers may be set")
    return value


def _load(
    model: nn.Module, state: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor], tied: Mapping[str, str]
) -> None:
    full = {**state, **{name: state[of] for name, of in tied.items() if of in state}}
    try:
        model.load_state_dict(full, strict=True, assign=True)
    except RuntimeError as e:
        raise CheckpointError(f"the weights don't fit the model that {MANIFEST} describes: {e}") from e
    for name, tensor in buffers.items():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = tensor
    for name, of in tied.items():
        (path, _, leaf), (of_path, _, of_leaf) = name.rpartition("."), of.rpartition(".")
        setattr(model.get_submodule(path), leaf, getattr(model.get_submodule(of_path), of_leaf))


def _attach_tables(model: nn.Module, tables: Mapping[str, Any]) -> None:
    """Hooks for tables of positions that are made anew for other sizes."""
    modules = dict(model.named_modules())
    for name, entry in tables.items():
        rule = table_of(modules[name]) if name in modules else None
        try:
            width, runs = entry
            kept = torch.from_numpy(unpack_runs(runs, width))
        except (TypeError, ValueError) as e:
            raise CheckpointError(f"{MANIFEST} describes the table of {name} wrongly: {e}") from None
        if rule is None or kept.numel() != getattr(modules[name], rule.buffer).shape[-1] or int(kept[-1]) >= width:
            raise CheckpointError(f"{MANIFEST} keeps columns of a table of {name} that isn't there")
        KeptColumns(kept, width).attach(modules[name])


def _fill_tensor_attributes(model: nn.Module, real: nn.Module | None) -> None:
    """Tensors that a class keeps as ordinary attributes are not in any state dict: take them from a real instance."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise CheckpointError(f"the checkpoint has no values for {name}: save the model again")
    if real is None:
        return
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                setattr(module, name, vars(real.get_submodule(path))[name])


def apply_shapes(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], attributes: Mapping[str, int | float | tuple[int, ...]]
) -> None:
    """Give a model on the meta device the shapes and attributes of a pruned one, for loading its weights.

    Raises:
        KeyError: a parameter or attribute that the model doesn't have.
    """
    first: dict[int, Tensor] = {}
    missing = set(shapes)
    for name, table, key, t in list(tables(model)):
        if id(t) in first:
            table[key] = first[id(t)]
        elif name in shapes:
            new: Tensor = torch.empty(shapes[name], dtype=t.dtype, device="meta")
            table[key] = nn.Parameter(new, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else new
            first[id(t)] = table[key]
            missing.discard(name)
    if missing:
        raise KeyError(f"{type(model).__name__} has no parameter {sorted(missing)[0]!r}")
    for path, value in attributes.items():
        module, name = owner_of(model, path)
        if not hasattr(module, name):
            raise KeyError(f"{type(model).__name__} has no attribute {path!r}")
        setattr(module, name, value)


def check_unpruned(model: nn.Module, before: Mapping[str, Any]) -> None:
    """Raises CheckpointError where ``model`` isn't what the pruned one was; names that it lacks are not looked at."""
    modules, shapes = dict(model.named_modules()), shapes_of(model)
    of_instance: dict[str, Any] = {}
    for path in before["attributes"]:
        owner, _, name = path.rpartition(".")
        if owner in modules and name in vars(modules[owner]):
            of_instance[path] = vars(modules[owner])[name]
    for name, was in [*before["shapes"].items(), *before["attributes"].items()]:
        found = shapes.get(name, of_instance.get(name))
        if found is not None and found != from_json(was):
            raise CheckpointError(
                f"the given {type(model).__name__} is not the model that was pruned: its {name} is {found}, it was "
                f"{from_json(was)}. Give an instance of the unpruned architecture"
            )
