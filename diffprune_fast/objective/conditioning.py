"""What a loader's batch means for a model: the images, and everything else that its forward wants."""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..architectures.denoisers import ADDED_KEYS, NEEDED_BY_CONFIG, TIMESTEP_NAMES

_log = logging.getLogger(__name__)

IMAGE_KEYS = ("sample", "images", "image", "pixel_values", "latents", "hidden_states", "x", "input", "img")


LABEL_KEYS = ("class_labels", "labels", "label")


PER_SAMPLE = ("class_labels", "encoder_hidden_states", "pooled_projections")


# Positions of tokens: one table for all samples, however many rows it has.
SHARED = ("img_ids", "txt_ids", "image_rotary_emb")


@dataclass(frozen=True)
class Signature:
    """The names that a denoiser's forward gives its inputs.

    sample: the noisy images. timestep: None where the model has none (an autoencoder). accepted: every name that may
    be passed as conditioning. required: those of them without a default. anything: forward takes ``**kwargs``.
    """

    sample: str
    timestep: str | None
    accepted: frozenset[str]
    required: tuple[str, ...]
    anything: bool = False


def signature_of(model: nn.Module) -> Signature:
    """Read from ``model.forward`` which argument is the image, which the timestep, which the conditioning.

    Raises TypeError where forward has no argument.
    """
    parameters = list(inspect.signature(model.forward).parameters.values())
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not named:
        raise TypeError(
            f"{type(model).__name__}.forward has no named argument to give the images to: pass loss_fn(model, batch, "
            "t, noise), which calls the model as it wants to be called"
        )
    sample, rest = named[0].name, named[1:]
    timestep = next((p.name for p in rest if p.name in TIMESTEP_NAMES), None)
    if timestep is None and not is_autoencoder(model) and rest:
        timestep = rest[0].name
    conditioning = [p for p in rest if p.name not in (timestep, "return_dict")]
    return Signature(
        sample=sample,
        timestep=timestep,
        accepted=frozenset(p.name for p in conditioning),
        required=tuple(p.name for p in conditioning if p.default is p.empty),
        anything=any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def is_autoencoder(model: nn.Module) -> bool:
    """True for models that encode and decode, and know no timestep (``AutoencoderKL``, ``VQModel``, …)."""
    if not (callable(getattr(model, "encode", None)) and callable(getattr(model, "decode", None))):
        return False
    return not any(name in inspect.signature(model.forward).parameters for name in TIMESTEP_NAMES)


def read_batch(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Any]]:
    """The images of a batch, and the conditioning inputs by the name that the model's forward gives them.

    batch: ``(batch, channels, ...)`` images; an ``(images, labels)`` pair (labels go to ``class_labels`` where the
    model has them, and are dropped where it has not); or a dict with the images under one of ``IMAGE_KEYS`` or the
    name of forward's first argument, and conditioning inputs under the names of forward's other arguments.

    Raises TypeError for another kind of batch, ValueError where an input that the model needs is missing.
    """
    signature = signature_of(model)
    images, inputs = _split(model, batch, signature)
    _check_complete(model, signature, inputs)
    for name in PER_SAMPLE:
        value = inputs.get(name)
        if isinstance(value, Tensor) and value.ndim and len(value) != len(images):
            raise ValueError(f"the batch has {len(images)} images, but {name} has {len(value)} rows")
    return images, inputs


def _split(model: nn.Module, batch: Any, signature: Signature) -> tuple[Tensor, dict[str, Any]]:
    if isinstance(batch, Tensor):
        return batch, {}
    if isinstance(batch, Mapping):
        key = next((k for k in (signature.sample, *IMAGE_KEYS) if isinstance(batch.get(k), Tensor)), None)
        if key is None:
            raise TypeError(
                f"the loader's dict has no image tensor: keys {sorted(map(str, batch))}, expected one of {IMAGE_KEYS}"
            )
        inputs = {k: v for k, v in batch.items() if k != key and (k in signature.accepted or signature.anything)}
        _check_keys(model, signature, batch, key)
        label = next((batch[k] for k in LABEL_KEYS if isinstance(batch.get(k), Tensor)), None)
        if label is not None and "class_labels" not in inputs and wants_labels(model):
            inputs["class_labels"] = label
        return batch[key], inputs
    if isinstance(batch, Sequence) and batch and isinstance(batch[0], Tensor):
        if len(batch) == 1:
            return batch[0], {}
        if len(batch) == 2 and isinstance(batch[1], Tensor) and not batch[1].is_floating_point():
            if not wants_labels(model):
                _say_unused(type(model).__name__, "labels")
                return batch[0], {}
            return batch[0], {"class_labels": batch[1].reshape(-1)}
        raise TypeError(
            f"the loader yields tuples of {len(batch)}; only (images, integer labels) is understood. "
            "Yield a dict that names the conditioning inputs, such as {'images': …, 'encoder_hidden_states': …}"
        )
    raise TypeError(
        f"the loader yields {type(batch).__name__}; expected an image tensor, an (images, labels) pair or a dict of "
        "tensors (or pass loss_fn, which gets the batch as it is)"
    )


def _check_keys(model: nn.Module, signature: Signature, batch: Mapping[Any, Any], images: str) -> None:
    """Raise ValueError for a tensor whose name is nearly one that the model takes: it was meant to be used."""
    unused = {k for k, v in batch.items() if isinstance(v, (Tensor, Mapping)) and isinstance(k, str)}
    unused -= {images, signature.sample, *signature.accepted, *IMAGE_KEYS, *LABEL_KEYS}
    for name in () if signature.anything else sorted(unused):
        near = difflib.get_close_matches(name, signature.accepted, 1, 0.8)
        if near:
            raise ValueError(
                f"the loader's batches have {name!r}, which {type(model).__name__} doesn't take: did you mean "
                f"{near[0]!r}?"
            )
        _say_unused(type(model).__name__, name)


@functools.cache
def _say_unused(model: str, name: str) -> None:
    _log.warning("the loader's batches have %r, which %s doesn't take: it is not used", name, model)


def config_of(owner: Any) -> Mapping[str, Any]:
    """The ``config`` of a model or scheduler as a mapping, be it a dict or an object; empty where there is none."""
    config = getattr(owner, "config", None)
    return config if isinstance(config, Mapping) else dict(getattr(config, "__dict__", {}))


def wants_labels(model: nn.Module) -> bool:
    """True where the model's config asks for class labels."""
    config = config_of(model)
    return (
        config.get("num_class_embeds") is not None
        or config.get("class_embed_type") is not None
        or config.get("norm_type") == "ada_norm_zero"
    )


def _check_complete(model: nn.Module, signature: Signature, inputs: Mapping[str, Any]) -> None:
    config = config_of(model)
    needed = list(signature.required)
    needed += [n for key, n in NEEDED_BY_CONFIG.items() if config.get(key) is not None and n in signature.accepted]
    if wants_labels(model) and "class_labels" in signature.accepted:
        needed.append("class_labels")
    added = ADDED_KEYS.get(config.get("addition_embed_type") or "", ())
    if added and "added_cond_kwargs" in signature.accepted:
        needed.append("added_cond_kwargs")
    for name in needed:
        if inputs.get(name) is None:
            raise ValueError(
                f"{type(model).__name__} needs {name!r}, but the loader's batches don't have it: "
                f"yield dicts such as {{'images': …, {name!r}: …}}"
            )
    if added and "added_cond_kwargs" in signature.accepted:
        lacking = [k for k in added if k not in inputs["added_cond_kwargs"]]
        if lacking:
            raise ValueError(f"{type(model).__name__} needs {lacking} in added_cond_kwargs: the batches don't have it")
