"""Inputs for one forward of a diffusers model, made from its config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Call = tuple[str, tuple[Any, ...], dict[str, Any]]
ExampleInputs = tuple[Any, ...] | dict[str, Any] | list[Call]


def calls_of(model: nn.Module, example_inputs: ExampleInputs | None) -> list[Call]:
    """The calls to trace: the user's inputs to ``forward``, or what the model's class is known to take.

    Raises:
        ValueError: nothing was given and the class isn't known.
        TypeError: a list.
    """
    if isinstance(example_inputs, list):
        if not all(isinstance(call, tuple) and len(call) == 3 and isinstance(call[0], str) for call in example_inputs):
            raise TypeError(
                "example_inputs is a list: give a tuple of the forward's positional arguments or a dict of its keyword "
                "arguments, or a list of calls, (method, args, kwargs) each"
            )
        return example_inputs  # calls already: of an autoencoder, say, encode and decode
    if isinstance(example_inputs, dict):
        return [("forward", (), dict(example_inputs))]
    if isinstance(example_inputs, Tensor):
        return [("forward", (example_inputs,), {})]
    if example_inputs is not None:
        return [("forward", tuple(example_inputs), {})]
    known = _known(model)
    if known is not None:
        return known(model)
    raise ValueError(
        f"no example inputs are known for {type(model).__name__}: give example_inputs, a tuple of the forward's "
        "positional arguments or a dict of its keyword arguments"
    )


def knows_inputs(model: nn.Module) -> bool:
    """True where the model's class is one whose inputs follow from its config."""
    return _known(model) is not None


def _known(model: nn.Module) -> Callable[[nn.Module], list[Call]] | None:
    """What makes the inputs of a class of diffusers' own, or of one that is derived from it."""
    for base in type(model).__mro__:
        if base.__name__ in _KNOWN and base.__module__.partition(".")[0] == "diffusers":
            return _KNOWN[base.__name__]
    return None


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _config(model: nn.Module) -> Any:
    return model.config


def _sizes(value: Any, default: int) -> tuple[int, int]:
    if value is None:
        return default, default
    return (value, value) if isinstance(value, int) else tuple(value)


def _unet2d(model: nn.Module) -> list[Call]:
    c = _config(model)
    kwargs: dict[str, Any] = {}
    if getattr(model, "class_embedding", None) is not None:
        kwargs["class_labels"] = _class_labels(c)
    default = 4 * 2 ** (len(c.block_out_channels) - 1)
    return [("forward", (_meta(1, c.in_channels, *_sizes(c.sample_size, default)), torch.tensor([1])), kwargs)]


def _class_labels(c: Any) -> Tensor:
    if c.class_embed_type == "timestep" or (c.class_embed_type is None and c.num_class_embeds is not None):
        return torch.tensor([0])
    if c.class_embed_type == "identity":
        return _meta(1, c.block_out_channels[0] * 4)
    return _meta(1, getattr(c, "projection_class_embeddings_input_dim", None) or c.block_out_channels[0])


def _unet2d_condition(model: nn.Module) -> list[Call]:
    c = _config(model)
    default = 8 * 2 ** (len(c.block_out_channels) - 1)
    width = c.encoder_hid_dim or c.cross_attention_dim
    width = width[0] if isinstance(width, (list, tuple)) else width
    kwargs: dict[str, Any] = {"encoder_hidden_states": _meta(1, 77, width)}
    if getattr(model, "class_embedding", None) is not None:
        kwargs["class_labels"] = _class_labels(c)
    if c.addition_embed_type == "text_time":
        ids = 6
        pooled = c.projection_class_embeddings_input_dim - ids * c.addition_time_embed_dim
        kwargs["added_cond_kwargs"] = {"text_embeds": _meta(1, pooled), "time_ids": _meta(1, ids)}
    if c.time_cond_proj_dim is not None:
        kwargs["timestep_cond"] = _meta(1, c.time_cond_proj_dim)
    return [("forward", (_meta(1, c.in_channels, *_sizes(c.sample_size, default)), torch.tensor([1])), kwargs)]


def _autoencoder_kl(model: nn.Module) -> list[Call]:
    """encode and decode are called apart from one another (the latents are an interface), so both are traced."""
    c = _config(model)
    size = _sizes(c.sample_size, 64)
    factor = 2 ** (len(c.block_out_channels) - 1)
    latents = _meta(1, c.latent_channels, *[n // factor for n in size])
    return [("encode", (_meta(1, c.in_channels, *size),), {}), ("decode", (latents,), {})]


def _autoencoder_temporal(model: nn.Module) -> list[Call]:
    """Decoded are frames that belong together."""
    encode, (method, (latents,), _) = _autoencoder_kl(model)
    return [encode, (method, (_meta(2, *latents.shape[1:]),), {"num_frames": 2})]


def _autoencoder_tiny(model: nn.Module) -> list[Call]:
    c = _config(model)
    factor = 2 ** (len(c.encoder_block_out_channels) - 1)
    latents = _meta(1, c.latent_channels, 64 // factor, 64 // factor)
    return [("encode", (_meta(1, c.in_channels, 64, 64),), {}), ("decode", (latents,), {})]


_KNOWN: dict[str, Callable[[nn.Module], list[Call]]] = {
    "UNet2DModel": _unet2d,
    "UNet2DConditionModel": _unet2d_condition,
    "AutoencoderKL": _autoencoder_kl,
    "AutoencoderKLTemporalDecoder": _autoencoder_temporal,
    "VQModel": _autoencoder_kl,
    "AutoencoderTiny": _autoencoder_tiny,
}
