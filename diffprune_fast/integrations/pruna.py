"""pruna with this package's pruning: ``"diffprune"`` for its ``smash``, of models and pipelines of diffusers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers import DiffusionPipeline, ModelMixin

from ..checkpoint.loading import from_pretrained
from ..checkpoint.manifest import PRUNED_WEIGHTS
from ..choices import CriterionName, Layouts
from ..method import score_and_prune
from ..pipelines.components import AUTOENCODERS, DENOISERS, find_component, is_pipeline, takes_captions
from ..pipelines.loading import pipeline_from_pretrained

try:
    from aenum import extend_enum
    from ConfigSpace import CategoricalHyperparameter, UniformFloatHyperparameter
    from pruna.algorithms.base.pruna_base import PrunaAlgorithmBase
    from pruna.algorithms.base.registry import AlgorithmRegistry
    from pruna.algorithms.base.tags import AlgorithmTag
    from pruna.config.hyperparameters import Boolean, Int
    from pruna.engine.load import LOAD_FUNCTIONS
    from pruna.engine.save import SAVE_FUNCTIONS, original_save_fn
    from pruna.engine.utils import load_json_config, move_to_device
    from pruna.logging.logger import pruna_logger
except ImportError as error:
    raise ImportError(
        f"diffprune_fast.integrations.pruna works inside pruna, which can't be imported ({error}): "
        "pip install pruna==0.3.4"
    ) from error

__all__ = ["DiffPrune", "register"]

NAME = "diffprune"
# The component that is pruned where nothing else is said, whatever its name.
DENOISER = "denoiser"


def register() -> DiffPrune:
    """Make the algorithm known to pruna: for ``SmashConfig``, ``smash`` and ``PrunaModel.from_pretrained``.

    Nothing of pruna is replaced: its lists of algorithms and of functions that save and load get an entry each.

    Returns:
        The algorithm; the same one when this is called again.

    Raises:
        ValueError: another algorithm has that name.

    Example:
        >>> from pruna import PrunaModel, SmashConfig, smash
        >>> algorithm = register()
        >>> config = SmashConfig({"diffprune": {"share": 0.6, "criterion": "magnitude"}}, device="cpu")
    """
    global _registered
    if _registered is not None:
        return _registered
    if NAME not in SAVE_FUNCTIONS.__members__:
        extend_enum(SAVE_FUNCTIONS, NAME, _Function(_save))
        extend_enum(LOAD_FUNCTIONS, NAME, _Function(_load))
    _registered = DiffPrune()
    AlgorithmRegistry.register_algorithm(_registered)
    return _registered


class DiffPrune(PrunaAlgorithmBase):
    """Removes whole channels of a diffusers model or a pipeline's denoiser, in place: see :func:`score_and_prune`."""

    algorithm_name = NAME
    group_tags = (AlgorithmTag.PRUNER,)
    references = {"Paper": "https://arxiv.org/abs/2305.10924"}  # noqa: RUF012
    runs_on = ("cpu", "cuda", "mps")
    tokenizer_required = processor_required = dataset_required = False
    compatible_before = ()
    # what changes the weights' type or the calls comes after
    compatible_after = ("half", "torch_compile", "deepcache", "diffusers_int8", "hqq_diffusers", "torchao")

    @property
    def save_fn(self) -> Any:
        """Safetensors and JSON, see :func:`~diffprune_fast.checkpoint.save`."""
        return SAVE_FUNCTIONS[NAME]

    def get_hyperparameters(self) -> list[Any]:
        """Those of :func:`score_and_prune` that pruna's configurations can hold."""
        return [
            CategoricalHyperparameter(
                "budget", ["macs", "params"], default_value="macs", meta={"desc": "What the share is of."}
            ),
            UniformFloatHyperparameter("share", 0.01, 0.99, default_value=0.6, meta={"desc": "How much is left."}),
            CategoricalHyperparameter(
                "criterion",
                list(get_args(CriterionName)),
                default_value="diff-pruning",
                meta={"desc": "What channels are scored by; magnitude and random need no data."},
            ),
            CategoricalHyperparameter(
                "layout",
                list(get_args(Layouts)),
                default_value="free",
                meta={"desc": "config: the result is an ordinary model of its class, loaded without this package."},
            ),
            Boolean("compensate", default=True, meta={"desc": "Solve the layers that lost inputs anew; needs data."}),
            Int("max_samples", 1, 1 << 20, 4096, meta={"desc": "Samples that scoring takes at most."}),
            Int("seed", 0, 1 << 30, 0, meta={"desc": "The same one keeps the same channels."}),
            CategoricalHyperparameter(
                "component",
                [DENOISER, *DENOISERS, *AUTOENCODERS],
                default_value=DENOISER,
                meta={"desc": "What of a pipeline is pruned."},
            ),
        ]

    def model_check_fn(self, model: Any) -> bool:
        """Whether the model is diffusers' own, or a pipeline with a denoiser."""
        if isinstance(model, ModelMixin):
            return True
        try:
            return isinstance(model, DiffusionPipeline) and find_component(model, None) is not None
        except ValueError:
            return False

    def _apply(self, model: Any, smash_config: Any) -> Any:
        component = None if smash_config["component"] == DENOISER else smash_config["component"]
        result = score_and_prune(
            model,
            batches_of(smash_config.train_dataloader(), model),
            component=component,
            compensate=smash_config["compensate"] and "auto",
            **{smash_config["budget"]: smash_config["share"]},
            **{name: smash_config[name] for name in ("criterion", "layout", "max_samples", "seed")},
        )
        for line in str(result).splitlines():
            pruna_logger.info(line)
        return model


def batches_of(loader: Iterable[Any] | None, model: Any) -> Iterable[Any] | None:
    """pruna's batches as :func:`score_and_prune` takes them: images first, captions for pipelines from text alone."""
    return None if loader is None else _Batches(loader, is_pipeline(model) and takes_captions(model))


class _Batches:
    """pruna yields ``(texts, images)`` or ``(images, labels)``, images of 0 to 255 unless asked otherwise."""

    def __init__(self, loader: Iterable[Any], from_text: bool) -> None:
        self._loader, self._from_text = loader, from_text

    def __iter__(self) -> Iterator[Any]:
        for first, second in self._loader:
            if isinstance(first, torch.Tensor):
                yield _in_range(first), second
            elif second is None:
                raise ValueError("the data of the SmashConfig has prompts alone: scoring needs images too")
            else:
                yield (_in_range(second), first) if self._from_text else _in_range(second)


def _in_range(images: torch.Tensor) -> torch.Tensor:
    return images if images.is_floating_point() else images / 127.5 - 1


class _Function:
    """A function as the value of an enumeration's member, where a bare one would be a method."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)


_registered: DiffPrune | None = None


def _save(model: Any, model_path: str | Path, smash_config: Any) -> None:
    """As pruna saves any model of diffusers; what no config describes is loaded by this package."""
    original_save_fn(model, model_path, smash_config)
    weights = PRUNED_WEIGHTS.replace(".", "*.")  # shards too
    free = any(Path(model_path).glob(weights)) or any(Path(model_path).glob(f"*/{weights}"))
    smash_config.load_fns = [NAME if free else LOAD_FUNCTIONS.diffusers.name]


def _load(path: str | Path, smash_config: Any, torch_dtype: torch.dtype | None = None, **options: Any) -> Any:
    """A model or pipeline, onto the configuration's device."""
    path = Path(path)
    if (path / "model_index.json").is_file():
        dtype = torch_dtype or getattr(torch, load_json_config(path, "dtype_info.json")["dtype"])
        model = pipeline_from_pretrained(path, torch_dtype=dtype, **options)
    else:
        model = from_pretrained(path, torch_dtype=torch_dtype, **options)
    move_to_device(model, smash_config.device, device_map=smash_config.device_map)
    return model
