"""The UNets whose shapes are benchmarked, as diffusers configs; built on ``meta``, so none of them is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

CIFAR: dict[str, Any] = {  # google/ddpm-cifar10-32, 35.7M parameters
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}
LSUN: dict[str, Any] = {  # google/ddpm-church-256, 113.7M parameters
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
    "layers_per_block": 2,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}
SD15: dict[str, Any] = {  # Stable Diffusion 1.5, 859.5M parameters
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL: dict[str, Any] = {  # Stable Diffusion XL, 2567.5M parameters
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def build(name: str) -> nn.Module:
    """``"cifar"``, ``"lsun"``, ``"sd15"`` or ``"sdxl"`` with diffusers' own initial weights."""
    from diffusers import UNet2DConditionModel, UNet2DModel

    models: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
        "cifar": (UNet2DModel, CIFAR),
        "lsun": (UNet2DModel, LSUN),
        "sd15": (UNet2DConditionModel, SD15),
        "sdxl": (UNet2DConditionModel, SDXL),
    }
    make, config = models[name]
    return make(**config)


def example_inputs(name: str) -> dict[str, torch.Tensor]:
    """One small forward's inputs."""
    sizes = {"cifar": (3, 32), "lsun": (3, 64), "sd15": (4, 32), "sdxl": (4, 32)}
    channels, size = sizes[name]
    inputs: dict[str, Any] = {"sample": torch.zeros(1, channels, size, size), "timestep": torch.zeros(1).long()}
    if name.startswith("sd"):
        inputs["encoder_hidden_states"] = torch.zeros(1, 77, SD15["cross_attention_dim"])
    return inputs


def parameter_shapes(name: str) -> list[tuple[int, ...]]:
    """Every parameter's shape, without memory for weights."""
    with torch.device("meta"):
        model = build(name)
    return [tuple(p.shape) for p in model.parameters()]


# Layer by layer: what makes up most of each model, and one small one of each kind.
LAYERS: dict[str, list[tuple[int, ...]]] = {
    "cifar": [(256, 512, 3, 3), (256, 256, 3, 3), (128, 128, 3, 3), (256, 256)],
    "lsun": [(512, 1024, 3, 3), (512, 512, 3, 3), (128, 256, 3, 3), (512, 512)],
    "sd15": [(1280, 1280, 3, 3), (1280, 2560, 3, 3), (640, 640, 3, 3), (1280, 5120), (10240, 1280), (320, 768)],
    "sdxl": [(1280, 1920, 3, 3), (10240, 1280), (1280, 2048), (1280, 1280)],
}
