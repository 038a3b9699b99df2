"""Tiny autoencoders of diffusers, of images, video and sound: encode and decode, as their pipelines call them."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from models import Case
from torch import Tensor, nn
from zoo_inputs import built, flat, random


def _codes(encoded: Any) -> Tensor:
    """The latents, whatever encode has put them in."""
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    return flat(encoded)


def _autoencoder(
    name: str,
    kind: Any,
    sample: tuple[int, ...],
    latents: tuple[int, ...],
    decode: dict[str, Any] | None = None,
    **config: Any,
) -> Case:
    """``sample`` and ``latents``: shapes without the batch. decode: further arguments of decode."""
    more = decode or {}

    def run(model: nn.Module) -> Tensor:
        codes = _codes(model.encode(random(2, *sample)))  # type: ignore[operator]
        image = model.decode(random(2, *latents, seed=1), **more)  # type: ignore[operator]
        return torch.cat([codes.reshape(-1), flat(image)])

    x, z = torch.empty(1, *sample, device="meta"), torch.empty(1, *latents, device="meta")
    calls = [("encode", (x,), {}), ("decode", (z,), more)]
    return Case(name, built(kind, **config), run, calls)  # type: ignore[arg-type]


def _dc(name: str, **changes: Any) -> Case:
    config: dict[str, Any] = {
        "latent_channels": 4,
        "attention_head_dim": 8,
        "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "encoder_block_out_channels": (16, 32),
        "decoder_block_out_channels": (16, 32),
        "encoder_layers_per_block": (1, 2),
        "decoder_layers_per_block": (1, 2),
        "encoder_qkv_multiscales": ((), (3,)),
        "decoder_qkv_multiscales": ((), (3,)),
        "upsample_block_type": "interpolate",
        "downsample_block_type": "stride_conv",
        "encoder_out_shortcut": False,
    }
    return _autoencoder(name, diffusers.AutoencoderDC, (3, 16, 16), (4, 8, 8), **{**config, **changes})


_KL2D: dict[str, Any] = {"norm_num_groups": 8, "latent_channels": 4, "sample_size": 16}
_WAN: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True],
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}
_LTX: dict[str, Any] = {
    "latent_channels": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": (1, 1, 1),
    "spatio_temporal_scaling": (True, True),
    "decoder_spatio_temporal_scaling": (True, True),
    "decoder_block_out_channels": (16, 32),
    "decoder_layers_per_block": (1, 1, 1),
    "decoder_inject_noise": (False, False, False),
    "patch_size": 1,
    "patch_size_t": 1,
}

MORE_AUTOENCODERS = [
    _autoencoder(
        "AsymmetricAutoencoderKL",
        diffusers.AsymmetricAutoencoderKL,
        (3, 16, 16),
        (4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        down_block_out_channels=(16, 32),
        up_block_out_channels=(24, 48),
        **_KL2D,
    ),
    _autoencoder(
        "AutoencoderKLTemporalDecoder",
        diffusers.AutoencoderKLTemporalDecoder,
        (3, 16, 16),
        (4, 8, 8),
        {"num_frames": 1},
        down_block_types=("DownEncoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        latent_channels=4,
        sample_size=16,
    ),
    _autoencoder(
        "AutoencoderKLFlux2",
        diffusers.AutoencoderKLFlux2,
        (3, 16, 16),
        (4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        **_KL2D,
    ),
    _dc("AutoencoderDC"),
    _dc(
        "AutoencoderDC-shortcuts",
        upsample_block_type="pixel_shuffle",
        downsample_block_type="pixel_unshuffle",
        encoder_out_shortcut=True,
    ),
    _autoencoder(
        "AutoencoderKLCogVideoX",
        diffusers.AutoencoderKLCogVideoX,
        (3, 5, 16, 16),
        (4, 2, 4, 4),
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(16, 16, 32),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_height=16,
        sample_width=16,
    ),
    _autoencoder(
        "AutoencoderKLCosmos",
        diffusers.AutoencoderKLCosmos,
        (3, 9, 32, 32),
        (4, 3, 4, 4),
        latent_channels=4,
        encoder_block_out_channels=(16, 16, 16, 16),
        decode_block_out_channels=(16, 16, 16, 16),
        attention_resolutions=(8,),
        resolution=32,
        num_layers=1,
        patch_size=2,
        patch_type="haar",
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        latents_mean=None,
        latents_std=None,
    ),
    _autoencoder(
        "AutoencoderKLHunyuanImage",
        diffusers.AutoencoderKLHunyuanImage,
        (3, 16, 16),
        (8, 8, 8),
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=16,
    ),
    _autoencoder(
        "AutoencoderKLHunyuanVideo",
        diffusers.AutoencoderKLHunyuanVideo,
        (3, 5, 16, 16),
        (4, 2, 4, 4),
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        block_out_channels=(16, 16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    ),
    _autoencoder(
        "AutoencoderKLKVAE",
        diffusers.AutoencoderKLKVAE,
        (3, 16, 16),
        (4, 8, 8),
        channels=32,
        num_enc_blocks=1,
        num_dec_blocks=1,
        z_channels=4,
        ch_mult=(1, 2),
        sample_size=16,
    ),
    _autoencoder(
        "AutoencoderKLLTXVideo",
        diffusers.AutoencoderKLLTXVideo,
        (3, 5, 16, 16),
        (8, 2, 4, 4),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        downsample_type=("conv", "conv"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        **_LTX,
    ),
    _autoencoder(
        "AutoencoderKLLTX2Video",
        diffusers.AutoencoderKLLTX2Video,
        (3, 5, 16, 16),
        (8, 2, 4, 4),
        down_block_types=("LTX2VideoDownBlock3D",) * 2,
        downsample_type=("spatial", "spatiotemporal"),
        upsample_type=("spatiotemporal", "spatial"),
        upsample_residual=(True, True),
        upsample_factor=(2, 2),
        **_LTX,
    ),
    _autoencoder(
        "AutoencoderKLLTX2Audio",
        diffusers.AutoencoderKLLTX2Audio,
        (2, 16, 16),
        (4, 4, 8),
        base_channels=16,
        ch_mult=(1, 2),
        num_res_blocks=1,
        latent_channels=4,
        resolution=16,
        mel_bins=16,
    ),
    _autoencoder(
        "AutoencoderKLMagvit",
        diffusers.AutoencoderKLMagvit,
        (3, 5, 16, 16),
        (4, 2, 4, 4),
        latent_channels=4,
        block_out_channels=[16, 32],
        down_block_types=["SpatialDownBlock3D", "SpatialTemporalDownBlock3D"],
        up_block_types=["SpatialUpBlock3D", "SpatialTemporalUpBlock3D"],
        layers_per_block=1,
        norm_num_groups=8,
    ),
    _autoencoder(
        "AutoencoderKLMochi",
        diffusers.AutoencoderKLMochi,
        (3, 7, 16, 16),
        (4, 2, 4, 4),
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        latent_channels=4,
        layers_per_block=(1, 1, 1, 1, 1),
        latents_mean=(0.0,) * 4,
        latents_std=(1.0,) * 4,
    ),
    _autoencoder("AutoencoderKLWan", diffusers.AutoencoderKLWan, (3, 5, 16, 16), (4, 2, 4, 4), **_WAN),
    _autoencoder("AutoencoderKLQwenImage", diffusers.AutoencoderKLQwenImage, (3, 1, 16, 16), (4, 1, 4, 4), **_WAN),
]
