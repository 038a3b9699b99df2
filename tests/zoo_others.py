"""Tiny configs of diffusers' less common denoisers and of models beside them."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro
from diffusers.models.transformers.lumina_nextdit2d import LuminaNextDiT2DModel
from torch import Tensor
from zoo_inputs import HEADS, built, case, random, text_mask, timesteps


def _text(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": random(batch, 4, 8, 8),
        "timestep": timesteps(batch),
        "encoder_hidden_states": random(batch, 7, 24),
    }


def _sizes(batch: int) -> dict[str, Tensor]:
    return {k: torch.full((batch, 2), 64.0).double() for k in ("original_size", "target_size", "crop_coords")}


def _allegro_rotary() -> tuple[tuple[tuple[Tensor, Tensor], ...], tuple[Tensor, ...]]:
    *tables, t, h, w = get_3d_rotary_pos_embed_allegro(12, ((0, 0), (4, 4)), (4, 4), 2)
    positions = torch.cartesian_prod(t.long(), h.long(), w.long()).T.reshape(3, 1, -1)
    return tuple(tables), tuple(positions)


_COGVIEW: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "text_embed_dim": 24,
    "time_embed_dim": 16,
    "condition_dim": 8,
    "pos_embed_max_size": 8,
    "sample_size": 8,
}
_UNET: dict[str, Any] = {"block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 24}
_SD3: dict[str, Any] = {
    **HEADS,
    "sample_size": 8,
    "in_channels": 4,
    "num_layers": 2,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 16,
    "out_channels": 4,
    "pos_embed_max_size": 8,
}

OTHERS = [
    case(
        "CogView3PlusTransformer2DModel",
        built(diffusers.CogView3PlusTransformer2DModel, **_COGVIEW),
        lambda b: {**_text(b), **_sizes(b)},
    ),
    case(
        "CogView4Transformer2DModel",
        built(diffusers.CogView4Transformer2DModel, **_COGVIEW, rope_axes_dim=(8, 8)),
        lambda b: {**_text(b), **_sizes(b)},
    ),
    case(
        "LuminaNextDiT2DModel",
        built(
            LuminaNextDiT2DModel,
            sample_size=8,
            hidden_size=64,
            num_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=16,
            cross_attention_dim=24,
        ),
        lambda b: {
            **_text(b),
            "timestep": random(b).sigmoid(),
            "encoder_mask": text_mask(b),
            "cross_attention_kwargs": {},
            "image_rotary_emb": torch.polar(torch.ones(4, 4, 8).double(), random(4, 4, 8)),
        },
        real=("image_rotary_emb",),
    ),
    case(
        "LatteTransformer3DModel",
        built(
            diffusers.LatteTransformer3DModel,
            **HEADS,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=32,
            attention_bias=True,
            sample_size=8,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            caption_channels=24,
            video_length=3,
        ),
        lambda b: {**_text(b), "hidden_states": random(b, 4, 3, 8, 8)},
    ),
    case(
        "AllegroTransformer3DModel",
        built(
            diffusers.AllegroTransformer3DModel,
            num_attention_heads=4,
            attention_head_dim=12,
            num_layers=2,
            cross_attention_dim=48,
            sample_height=8,
            sample_width=8,
            sample_frames=2,
            caption_channels=24,
        ),
        lambda b: {
            **_text(b),
            "hidden_states": random(b, 4, 2, 8, 8),
            "attention_mask": torch.ones(b, 2, 8, 8).double(),
            "encoder_attention_mask": text_mask(b),
            "image_rotary_emb": _allegro_rotary(),
        },
        real=("attention_mask", "image_rotary_emb"),
    ),
    case(
        "OmniGenTransformer2DModel",
        built(
            diffusers.OmniGenTransformer2DModel,
            in_channels=4,
            hidden_size=64,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=96,
            num_layers=2,
            pad_token_id=0,
            vocab_size=50,
            pos_embed_max_size=8,
            rope_scaling={"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
        ),
        lambda b: {
            "hidden_states": random(b, 4, 8, 8),
            "timestep": random(b).sigmoid(),
            "input_ids": torch.arange(b * 7).reshape(b, 7),
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": torch.ones(b, 1, 24, 24, dtype=torch.bool),
            "position_ids": torch.arange(24).expand(b, 24),
        },
    ),
    case(
        "Kandinsky3UNet",
        built(
            diffusers.Kandinsky3UNet,
            cross_attention_dim=24,
            block_out_channels=(32, 64, 64, 64),
            time_embedding_dim=64,
            groups=8,
            layers_per_block=2,
            attention_head_dim=8,
            encoder_hid_dim=24,
        ),
        lambda b: {
            "sample": random(b, 4, 16, 16),
            "timestep": timesteps(b),
            "encoder_hidden_states": random(b, 7, 24),
            "encoder_attention_mask": text_mask(b),
        },
    ),
    case(
        "I2VGenXLUNet",
        built(
            diffusers.I2VGenXLUNet,
            **_UNET,
            norm_num_groups=8,
            attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        ),
        lambda b: {
            "sample": random(b, 4, 3, 8, 8),
            "timestep": timesteps(b),
            "fps": torch.tensor([8, 16])[:b],
            "image_latents": random(b, 4, 3, 8, 8, seed=1),
            "image_embeddings": random(b, 24),
            "encoder_hidden_states": random(b, 7, 24),
        },
    ),
    case(
        "SD3ControlNetModel",
        built(diffusers.SD3ControlNetModel, **_SD3),
        lambda b: {**_text(b), "controlnet_cond": random(b, 4, 8, 8, seed=1), "pooled_projections": random(b, 16)},
    ),
    *[
        case(
            f"T2IAdapter-{kind}",
            built(
                diffusers.T2IAdapter,
                channels=[32, 64],
                num_res_blocks=1,
                downscale_factor=4,
                adapter_type=f"{kind}_adapter",
            ),
            lambda b: {"x": random(b, 3, 32, 32)},
        )
        for kind in ("full", "light")
    ],
]
