"""``model_index.json`` of a pipeline's folder: which class is which component. It isn't trusted."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.errors import CheckpointError
from ..checkpoint.hub import INDEX
from ..checkpoint.reading import check_harmless, read_json

# What diffusers notes beside the components.
_NOTES = frozenset({"_class_name", "_diffusers_version", "_name_or_path", "_ignore_files"})

# What transformers renamed.
_RENAMED = {"CLIPFeatureExtractor": "CLIPImageProcessor"}


@dataclass(frozen=True)
class Index:
    """A checked index: the pipeline's class, the class of each component (None: it has none), plain arguments."""

    pipeline: type
    components: Mapping[str, type | None]
    arguments: Mapping[str, Any]


def read_index(directory: Path) -> Index:
    """The contents of ``model_index.json``.

    Every name in it is one of the pipeline's signature; every value is ``[library, class]`` of diffusers or
    transformers, or a plain value of one of the pipeline's optional arguments.

    Raises CheckpointError for anything else.
    """
    path = directory / INDEX
    try:
        index = read_json(path, directory)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {directory} is no pipeline (one model: from_pretrained)") from None
    check_harmless(index, path)
    cls = _pipeline_class(index.get("_class_name") if isinstance(index, dict) else None, path)
    known = {n: p for n, p in inspect.signature(cls.__init__).parameters.items() if p.kind is not p.VAR_KEYWORD}  # type: ignore[misc]
    del known["self"]
    components: dict[str, type | None] = {}
    arguments: dict[str, Any] = {}
    for name, value in index.items():
        if name in _NOTES:
            continue
        if name not in known:
            raise CheckpointError(
                f"{path} has {name!r}, which {cls.__name__} doesn't take: install the diffusers that saved it, if it "
                "is to be trusted"
            )
        default, optional = known[name].default, name in cls._optional_components  # type: ignore[attr-defined]
        found = _component_class(value)
        if value == [None, None]:
            components[name] = None
        elif found is not None:
            components[name] = found
        elif default is inspect.Parameter.empty or optional or not _is_plain(value, default):
            raise CheckpointError(f"{path}: {name} is {repr(value)[:80]}, no class of diffusers or transformers")
        else:
            arguments[name] = value
    for name, parameter in known.items():
        if components.get(name) is None and name not in arguments and parameter.default is parameter.empty:
            if name not in cls._optional_components:  # type: ignore[attr-defined]
                raise CheckpointError(f"{path} lacks {name}, which {cls.__name__} needs: copy the whole pipeline")
            components[name] = None
    return Index(cls, components, arguments)


def _pipeline_class(name: Any, path: Path) -> type:
    import diffusers

    cls = _exported(diffusers, name)
    if cls is None or not issubclass(cls, diffusers.DiffusionPipeline) or cls is diffusers.DiffusionPipeline:
        raise CheckpointError(f"{path} names {name!r}, which is no pipeline of diffusers {diffusers.__version__}")
    return cls


def _exported(library: Any, name: Any) -> type | None:
    """The class of this name in a library, defined in diffusers or transformers, or None."""
    if not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
        return None
    cls = getattr(library, name, None)
    return cls if isinstance(cls, type) and cls.__module__.startswith(("diffusers.", "transformers.")) else None


def _component_class(value: Any) -> type | None:
    """The class that ``[library, class]`` names, if that is code that is installed and can be a component."""
    import diffusers

    if not (isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)):
        return None
    library, name = value
    if library == "diffusers":
        cls = _exported(diffusers, name)
        return cls if cls is not None and is_loadable(cls) else None
    if library == "transformers":
        try:
            import transformers
        except ImportError:
            raise CheckpointError(f"{name} is a class of transformers, which is not installed: install it") from None
        cls = _exported(transformers, _RENAMED.get(name, name))
        # These look for a class in the folder's config, and may ask the user whether to run it.
        return cls if cls is not None and is_loadable(cls) and not name.startswith("Auto") else None
    # Parts of one pipeline only, such as a safety checker, are exported by that pipeline's package.
    package = getattr(diffusers.pipelines, library, None) if library.isidentifier() else None
    if not (inspect.ismodule(package) and package.__name__ == f"diffusers.pipelines.{library}"):
        return None
    if not hasattr(package, "__path__"):
        return None
    cls = _exported(package, name)
    return cls if cls is not None and is_loadable(cls) and cls.__module__.startswith("diffusers.") else None


def is_loadable(cls: type) -> bool:
    """Whether a class is a model, scheduler, tokenizer or processor, none that stands for others."""
    import diffusers

    bases: list[Any] = [diffusers.ModelMixin, diffusers.SchedulerMixin]
    if is_of_transformers(cls):
        return True
    return any(issubclass(cls, base) and cls is not base for base in bases)


def is_of_transformers(cls: type) -> bool:
    """Whether transformers loads a class: a model, tokenizer or processor."""
    try:
        import transformers
    except ImportError:
        return False
    names = ("PreTrainedModel", "PreTrainedTokenizerBase", "FeatureExtractionMixin", "ImageProcessingMixin")
    bases = [getattr(transformers, n, None) for n in (*names, "ProcessorMixin")]
    return any(isinstance(base, type) and issubclass(cls, base) and cls is not base for base in bases)


def _is_plain(value: Any, default: Any) -> bool:
    """Whether a value of JSON is of the kind that an argument's default is."""
    if value is None:
        return True
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, (int, float)):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, str):
        return isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))
    return True
