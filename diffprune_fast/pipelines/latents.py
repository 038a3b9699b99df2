"""From images to the latents that a pipeline's denoiser knows, and the proof that the pipeline decodes those."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..objective.calls import Called
from ..objective.conditioning import config_of
from ..objective.loss import dtype_of, latents_of
from .components import AUTOENCODERS, modules_of

# The pipeline may decode in half precision, which rounds to .001 or .008; another scale or shift is farther off.
TOLERANCE = 0.02


def upcast(vae: nn.Module | None) -> nn.Module | None:
    """A VAE that overflows in half precision, in single precision: a copy, as the pipelines decode with."""
    if vae is None or dtype_of(vae) != torch.float16 or not config_of(vae).get("force_upcast"):
        return vae
    return copy.deepcopy(vae).float().eval()


def raw_latents(vae: nn.Module, images: Tensor) -> Tensor:
    """Latents as the VAE makes them, drawn from its distribution where it has one; images are videos of one frame for a
    VAE of videos.

    Drawn from the CPU's global generator, which scoring seeds: the same numbers for every device.
    """
    images = as_video(vae, images)
    device = next(vae.parameters()).device
    encoded = vae.encode(images.to(device, dtype_of(vae)))  # type: ignore[operator]
    return latents_of(encoded, torch.default_generator).float()


def as_video(vae: nn.Module, images: Tensor) -> Tensor:
    """Images as videos of one frame, where the VAE is one of videos."""
    return images.unsqueeze(2) if images.ndim == 4 and any(isinstance(m, nn.Conv3d) for m in vae.modules()) else images


def normalised(vae: nn.Module, latents: Tensor) -> Tensor:
    """Shifted and scaled by the VAE's config: the inverse of what pipelines do before ``vae.decode``."""
    config = config_of(vae)
    mean, std, shift = config.get("latents_mean"), config.get("latents_std"), config.get("shift_factor")
    shape = (1, -1, *[1] * (latents.ndim - 2))
    if mean is not None and std is not None:
        mean, std = (torch.as_tensor(x, dtype=latents.dtype, device=latents.device).view(shape) for x in (mean, std))
        latents = (latents - mean) / std
    elif shift is not None:
        latents = latents - shift
    return latents * (config.get("scaling_factor") or 1.0)


def as_they_are(vae: nn.Module, latents: Tensor) -> Tensor:
    """Some pipelines (Kandinsky's) don't scale, whatever the config says."""
    return latents


def packed(pipe: Any, latents: Tensor, noisy: Tensor) -> Tensor:
    """Latents as tokens, where the pipeline packs its ``noisy`` ones so."""
    pack = getattr(pipe, "_pack_latents", None)
    if pack is None or noisy.ndim != 3:
        return latents
    n, channels, height, width = latents.shape[0], latents.shape[1], *latents.shape[-2:]
    sizes = {"batch_size": n, "num_channels_latents": channels, "height": height, "width": width}
    if set(inspect.signature(pack).parameters) != {"latents", *sizes}:
        return latents
    return pack(latents=latents.contiguous(), **sizes)


def decodes(pipe: Any, name: str, latents: Tensor, raw: Tensor, call: Callable[[Any], None]) -> bool:
    """Whether the pipeline gives its VAE ``raw`` to decode when its denoising ends in ``latents``.

    name: of the denoiser, which doesn't run; nor does the VAE. call: calls the pipeline that it is given.
    """
    pipe = copy.copy(pipe)
    pipe.scheduler = copy.deepcopy(pipe.scheduler)
    pipe.scheduler.step = lambda *_, **__: _Step([latents])
    modules = modules_of(pipe)
    setattr(pipe, name, _answers_with_zeros(modules[name]))
    vae_name = next(n for n in AUTOENCODERS if n in modules)
    setattr(pipe, vae_name, _stops_at_decode(modules[vae_name]))
    try:
        call(pipe)
    except Called as called:
        found = called.arguments["latents"].to(raw)
        return found.shape == raw.shape and bool((found - raw).abs().max() <= TOLERANCE * raw.abs().max())
    return False


class _Step(tuple):
    """What a scheduler's step answers, in both of its forms."""

    @property
    def prev_sample(self) -> Tensor:
        return self[0]


def _stops_at_decode(vae: nn.Module) -> nn.Module:
    """A copy that shares no weights, since a pipeline may cast its VAE in place: in their places stand empty ones."""

    def decode(*args: Any, **kwargs: Any) -> None:
        raise Called({"latents": [*args, *kwargs.values()][0]})

    empty: dict[int, Any] = {id(p): nn.Parameter(p.detach().new_empty(0), False) for p in vae.parameters()}
    empty |= {id(b): b.new_empty(0) for b in vae.buffers()}
    twin = copy.deepcopy(vae, empty)
    twin.decode = decode  # type: ignore[assignment]
    return twin


def _answers_with_zeros(model: nn.Module) -> nn.Module:
    """A shallow copy whose forward answers at once, with as many channels as the model has."""
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    signature = inspect.signature(model.forward)
    channels = config_of(model).get("out_channels")

    def forward(*args: Any, **kwargs: Any) -> Any:
        sample = next(iter(signature.bind(*args, **kwargs).arguments.values()))
        shape = list(sample.shape)
        if sample.ndim > 3 and isinstance(channels, int):
            shape[1] = channels
        return Transformer2DModelOutput(sample=sample.new_zeros(shape))

    twin = copy.copy(model)
    twin._forward_pre_hooks, twin._forward_hooks = OrderedDict(), OrderedDict()
    twin.forward = forward
    return twin
