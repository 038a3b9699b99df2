"""What a diffusers config says of a model's widths, and models built from one without memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def build_on_meta(cls: type, config: dict[str, Any]) -> nn.Module:
    """An instance of a diffusers class without memory for its weights."""
    with torch.device("meta"):
        return cls.from_config(config)  # type: ignore[attr-defined]


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every parameter and buffer, tied ones under each of their names."""
    named = itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return {name: tuple(t.shape) for name, t in named}


def own_config(model: Any) -> dict[str, Any]:
    """The arguments that a diffusers model was built with, without what diffusers notes beside them."""
    return {k: v for k, v in dict(model.config).items() if not k.startswith("_")}


def _widths(shapes: dict[str, tuple[int, ...]], prefix: str = "") -> tuple[int, ...]:
    """The output channels of each down block: of its first ResNet's second convolution."""
    widths: list[int] = []
    for i in itertools.count():
        shape = shapes.get(f"{prefix}down_blocks.{i}.resnets.0.conv2.weight")
        if shape is None:
            return tuple(widths)
        widths.append(shape[0])
    raise AssertionError  # itertools.count never ends


def _head_sizes(model: nn.Module) -> list[int]:
    """The head sizes of the attentions, each once."""
    layers: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "to_q", None), nn.Linear)]
    return sorted({m.to_q.weight.shape[0] // m.heads for m in layers if getattr(m, "heads", 0)})


def _unet2d(model: nn.Module, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, Any]]:
    for size in dict.fromkeys([config.get("attention_head_dim"), *_head_sizes(model)]):
        yield {"block_out_channels": _widths(shapes), "attention_head_dim": size}


def _unet2d_condition(
    model: nn.Module, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> Iterator[dict[str, Any]]:
    widths = _widths(shapes)
    yield {"block_out_channels": widths}
    time = shapes.get("time_embedding.linear_1.weight", (0,))[0]
    yield {"block_out_channels": widths, "time_embedding_dim": time}


def _autoencoder_kl(
    model: nn.Module, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> Iterator[dict[str, Any]]:
    yield {"block_out_channels": _widths(shapes, "encoder.")}


_RULES = {"UNet2DModel": _unet2d, "UNet2DConditionModel": _unet2d_condition, "AutoencoderKL": _autoencoder_kl}
