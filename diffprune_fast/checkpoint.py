"""Saving and loading pruned models: safetensors and JSON, nothing that runs.

A directory holds ``diffusion_pytorch_model.safetensors`` (the weights under diffusers' own name; under another one
where blocks are missing that a config can't leave out), ``config.json`` (the model's config) and ``diffprune.json``
(the manifest: shapes, keep-sets, how they came to be). Where a plain config describes the pruned model, ``config.json``
is that one and the class's own ``from_pretrained`` reads the directory.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .depth.passthrough import drop_again, dropped_blocks
from .manifest import FORMAT, MANIFEST, CheckpointError, pack_runs, provenance, read_manifest, unpack_runs, versions
from .plain_config import build_on_meta, changed_attributes, is_settable, own_config, plain_config, shapes_of
from .position_tables import KeptColumns, kept_columns, table_of
from .unpruned import changed_since, check_unpruned, note, noted

if TYPE_CHECKING:
    from .result import PruneResult

WEIGHTS = "diffusion_pytorch_model.safetensors"
# The weights of a model with blocks dropped in place. Under its own name diffusers would load them, into a model that
# has the blocks, and leave those blocks' weights at random.
SHALLOW_WEIGHTS = "diffprune_model.safetensors"
BUFFERS = "diffprune_buffers.safetensors"  # buffers that a state dict leaves out, as the pruned model has them
CONFIG = "config.json"


def save(result: PruneResult, directory: str | os.PathLike[str]) -> None:
    """Write a pruned model and its manifest into ``directory``, which is made if need be.

    Everything is written beside it first and moved in at the end, the manifest last: a save that breaks off leaves
    either the former checkpoint or one that refuses to load.

    Raises CheckpointError for a model that has no memory (``meta``) or state that isn't tensors; OSError from the disk.
    """
    _write(result.model, _record(result), Path(directory))


class SavedAsPruned:
    """``save_pretrained`` of a pruned module: diffusers' own would write the config of the widths before pruning.

    model: the pruned module. record: what the manifest says about its pruning.
    """

    def __init__(self, model: nn.Module, record: Mapping[str, Any]) -> None:
        self.model, self.record = model, record

    @classmethod
    def from_manifest(cls, model: nn.Module, manifest: Mapping[str, Any]) -> SavedAsPruned:
        """For a module that was loaded: it is saved again with the record it came with."""
        record = {k: v for k, v in manifest.items() if k not in _OF_THE_FILES}
        return cls(model, {**record, "keep": {name: pack_runs(units) for name, units in manifest["keep"].items()}})

    def __call__(self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **options: Any) -> None:
        """Write the module as :func:`save` does. Raises ValueError for options of diffusers that this format lacks."""
        wanted = {k for k, v in options.items() if v is not None and (k, v) not in _AS_IT_IS}
        if wanted:
            raise ValueError(f"a pruned {type(self.model).__name__} is saved as one safetensors file, without {wanted}")
        if is_main_process:
            _write(self.model, self.record, Path(save_directory))


def saved_as_pruned(result: PruneResult) -> PruneResult:
    """From now on a diffusers model is saved as a pruned one also by its own ``save_pretrained``."""
    if hasattr(result.model, "save_config"):
        result.model.save_pretrained = SavedAsPruned(result.model, _record(result))  # type: ignore[assignment]
    return result


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
)
# Options of diffusers' save_pretrained that ask for what is done anyway.
_AS_IT_IS = (("safe_serialization", True), ("push_to_hub", False), ("use_flashpack", False))


def _record(result: PruneResult) -> dict[str, Any]:
    """What the manifest says that the pruned model itself doesn't."""
    return {
        "plan": result.plan.hash,
        "attributes": {name: value for name, value in result.attributes.items() if is_settable(value)},
        "keep": {name: pack_runs(units) for name, units in result.keep.items()},
        **provenance(result),
    }


def _write(model: nn.Module, record: Mapping[str, Any], directory: Path) -> None:
    weights, tied = _weights(model)
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
        "unpruned": noted(model) if plain is None else {"shapes": shapes_of(model), "attributes": {}},
        "attributes": {} if plain is not None else _attributes(model, record["attributes"], is_diffusers),
    }
    directory.mkdir(parents=True, exist_ok=True)
    written = Path(tempfile.mkdtemp(prefix=".diffprune-", dir=directory))
    try:
        files = [_weights_file(dropped)]
        save_file(weights, written / files[0], metadata={"format": "pt"})
        manifest["sha256"] = {files[0]: _sha256(written / files[0])}
        if buffers:
            save_file(buffers, written / BUFFERS, metadata={"format": "pt"})
            manifest["sha256"][BUFFERS] = _sha256(written / BUFFERS)
            files.append(BUFFERS)
        if is_diffusers:
            of_config = build_on_meta(type(model), plain) if plain is not None else model
            of_config.save_config(written)  # type: ignore[operator]
            files.append(CONFIG)
        (written / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        (directory / MANIFEST).unlink(missing_ok=True)
        for name in [*files, MANIFEST]:
            shutil.copymode(written / MANIFEST, written / name)  # safetensors makes files that others can't read
            os.replace(written / name, directory / name)
        for name in {WEIGHTS, SHALLOW_WEIGHTS, BUFFERS} - {*files}:  # of a former checkpoint
            (directory / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(written, ignore_errors=True)


def from_pretrained(
    directory: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    torch_dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    verify: bool = True,
) -> nn.Module:
    """Load a pruned model, in evaluation mode, onto ``device`` (None: the CPU).

    model: for classes outside diffusers, an instance of the unpruned architecture (on any device; it isn't changed);
    classes of diffusers are built from ``config.json``. torch_dtype: of the floating-point weights; None keeps what
    was saved. verify: compare the weights' SHA-256 with the manifest; False for weights replaced on purpose.

    No code of the checkpoint is run: weights are safetensors, the class is one of diffusers' models or the caller's.

    Raises CheckpointError for anything that is missing, cut short or contradictory.
    """
    directory = Path(directory)
    if (directory / "model_index.json").exists():
        raise CheckpointError(f"{directory} is a whole pipeline: load it with pipeline_from_pretrained")
    manifest = read_manifest(directory)
    state = _read_tensors(directory, _weights_file(manifest["dropped"]), manifest, verify)
    buffers = _read_tensors(directory, BUFFERS, manifest, verify) if BUFFERS in manifest["sha256"] else {}
    _check_names({**state, **buffers}, manifest)

    shaped, real = _empty_model(directory, manifest, model)
    if model is not None:
        check_unpruned(shaped, manifest["unpruned"])
    note(shaped, manifest["unpruned"])
    _apply(shaped, manifest)
    _load(shaped, state, buffers, manifest["tied"])
    _attach_tables(shaped, manifest["tables"])
    _fill_tensor_attributes(shaped, real)
    if torch_dtype is not None:
        shaped.to(torch_dtype)
    if device is not None:
        shaped.to(device)
    if hasattr(shaped, "save_config"):
        shaped.save_pretrained = SavedAsPruned.from_manifest(shaped, manifest)  # type: ignore[assignment]
    return shaped.eval()


def _weights_file(dropped: Mapping[str, Any]) -> str:
    return SHALLOW_WEIGHTS if dropped else WEIGHTS


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


def _attributes(model: nn.Module, known: Mapping[str, Any], is_diffusers: bool) -> dict[str, Any]:
    """What a freshly built model lacks, also where it was pruned before and ``known`` is of the last time only."""
    attributes = {**known, **changed_since(model)}
    if is_diffusers:
        attributes.update(changed_attributes(model, build_on_meta(type(model), own_config(model))))
    return {n: list(v) if isinstance(v, tuple) else v for n, v in sorted(attributes.items())}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_tensors(directory: Path, name: str, manifest: Mapping[str, Any], verify: bool) -> dict[str, torch.Tensor]:
    path = directory / name
    try:
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
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory / CONFIG} is missing: pass model=, an unpruned {name}, for a class outside diffusers"
        ) from None
    except (ValueError, OSError) as e:
        raise CheckpointError(f"{directory / CONFIG} can't be read ({e}): save the model again") from e
    if not isinstance(config, dict) or config.get("_class_name") != name:
        raise CheckpointError(f"{directory / CONFIG} is not the config of a {name}, which {MANIFEST} names")
    cls = diffusers_class(name)
    try:
        empty = build_on_meta(cls, config)
        has_tensors = any(isinstance(v, torch.Tensor) for m in empty.modules() for v in vars(m).values())
        return empty, cls.from_config(config) if has_tensors else None  # type: ignore[attr-defined]
    except Exception as e:  # whatever the class makes of a config that isn't its own
        raise CheckpointError(f"{name} can't be built from {directory / CONFIG}: {type(e).__name__}: {e}") from e


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
    from .slicing import apply_shapes

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
