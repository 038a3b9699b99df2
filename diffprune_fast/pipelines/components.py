"""The parts of a pipeline: finding the one to prune, and putting the pruned one in its place."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..objective.checks import in_channels
from ..objective.conditioning import config_of
from ..objective.isolation import unwrapped

DENOISERS = ("unet", "transformer", "prior", "decoder")


AUTOENCODERS = ("vae", "vqvae", "vqgan", "movq")


def is_pipeline(model: Any) -> bool:
    """True for a diffusers pipeline: something with ``components`` that is no module itself."""
    return not isinstance(model, nn.Module) and isinstance(getattr(model, "components", None), Mapping)


def modules_of(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's models by name, as they are inside ``torch.compile``."""
    return {name: unwrapped(m) for name, m in pipe.components.items() if isinstance(m, nn.Module)}


def find_component(pipe: Any, name: str | None = None) -> tuple[str, nn.Module]:
    """A component's name and module; the denoiser's for None.

    Raises ValueError for a name that the pipeline doesn't have, and for a component that is offloaded.
    """
    modules = modules_of(pipe)
    wanted = name or next((n for n in DENOISERS if n in modules), None)
    if wanted is None or wanted not in modules:
        what = f"component {name!r}" if name else f"denoiser ({', '.join(DENOISERS)})"
        raise ValueError(
            f"{type(pipe).__name__} has no {what}: give component=, one of {', '.join(sorted(modules)) or 'none'}"
        )
    if any(hasattr(m, "_hf_hook") for m in modules[wanted].modules()):
        raise ValueError(
            f"{wanted} is offloaded to another device between calls: call pipe.remove_all_hooks() and move it to the "
            "device that is to score it; the text encoders may stay on the CPU"
        )
    return wanted, modules[wanted]


def autoencoder_of(pipe: Any) -> nn.Module | None:
    """The autoencoder between the pipeline's images and its latents, None where it works on pixels."""
    modules = modules_of(pipe)
    return next((modules[n] for n in AUTOENCODERS if n in modules), None)


def image_shape(pipe: Any) -> tuple[int, int | None]:
    """The channels of the pipeline's images, and the size in pixels that it makes by default (None: not known)."""
    _, denoiser = find_component(pipe)
    vae = autoencoder_of(pipe)
    sample = getattr(pipe, "default_sample_size", None) or config_of(denoiser).get("sample_size")
    blocks = config_of(vae).get("block_out_channels", (0,))
    factor = getattr(pipe, "vae_scale_factor", None) or 2 ** (len(blocks) - 1)
    channels = in_channels(denoiser if vae is None else vae)
    return channels or 3, sample * factor if isinstance(sample, int) else None


def takes_captions(pipe: Any) -> bool:
    """Whether the pipeline makes images from text."""
    return "prompt" in inspect.signature(pipe.__call__).parameters


def place_of(pipe: Any, name: str, model: nn.Module) -> dict[str, Any]:
    """The fields of a result that name the pipeline: the given one where it holds the model, else a shallow copy."""
    if modules_of(pipe)[name] is not model:
        pipe = copy.copy(pipe)
        setattr(pipe, name, model)
    return {"pipeline": pipe, "component": name}
