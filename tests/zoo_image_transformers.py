"""Tiny transformers of images of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from models import Case
from torch import nn
from zoo_inputs import HEADS, built, case, random, text_mask, timesteps


def _tokens(batch: int) -> dict[str, Any]:
    return {"hidden_states": random(batch, 4, 8, 8), "timestep": timesteps(batch)}


def _text(batch: int) -> dict[str, Any]:
    return {**_tokens(batch), "encoder_hidden_states": random(batch, 7, 24)}


def _pixart(additional: bool) -> Case:
    def inputs(b: int) -> dict[str, Any]:
        extra = {"resolution": random(b, 2), "aspect_ratio": random(b, 1)} if additional else {}
        return {**_text(b), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None, **extra}}

    make = built(
        diffusers.PixArtTransformer2DModel,
        num_attention_heads=4,
        attention_head_dim=12,  # the size conditions take thirds of the width
        in_channels=4,
        num_layers=2,
        norm_num_groups=8,
        cross_attention_dim=48,
        sample_size=8,
        use_additional_conditions=additional,
        caption_channels=24,
    )
    return case("PixArtTransformer2DModel" + "-additional" * additional, make, inputs)


def _sd3(**changes: Any) -> Callable[[], nn.Module]:
    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "num_layers": 3,
        "joint_attention_dim": 24,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 16,
        "out_channels": 4,
        "pos_embed_max_size": 8,
    }
    return built(diffusers.SD3Transformer2DModel, **{**HEADS, **config, **changes})


def _pooled(batch: int) -> dict[str, Any]:
    return {**_text(batch), "pooled_projections": random(batch, 16)}


def _packed(batch: int) -> dict[str, Any]:
    grid = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(4.0), torch.arange(4.0), indexing="ij"), -1)
    return {
        "hidden_states": random(batch, 16, 8),
        "encoder_hidden_states": random(batch, 7, 24),
        "timestep": random(batch).sigmoid(),
        "img_ids": grid.reshape(16, 3).double(),
        "txt_ids": torch.zeros(7, 3).double(),
    }


_FLUX: dict[str, Any] = {
    "in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 4, 8),
}
_SANA: dict[str, Any] = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 32,
    "caption_channels": 24,
    "sample_size": 8,
}
_LUMINA: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "hidden_size": 64,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "multiple_of": 16,
    "axes_dim_rope": (4, 4, 8),
    "axes_lens": (32, 32, 32),
    "cap_feat_dim": 24,
}


def _hunyuan_dit(style: bool) -> Case:
    def inputs(b: int) -> dict[str, Any]:
        extra = {"image_meta_size": torch.full((b, 6), 64.0).double(), "style": torch.zeros(b, dtype=torch.long)}
        return {
            "hidden_states": random(b, 4, 8, 8),
            "timestep": timesteps(b).double(),
            "encoder_hidden_states": random(b, 7, 24),
            "text_embedding_mask": text_mask(b),
            "encoder_hidden_states_t5": random(b, 8, 24),
            "text_embedding_mask_t5": text_mask(b, 8),
            "image_rotary_emb": get_2d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), output_type="pt"),
            **(extra if style else {}),
        }

    make = built(
        diffusers.HunyuanDiT2DModel,
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=64,
        num_layers=4,
        mlp_ratio=2.0,
        cross_attention_dim=24,
        cross_attention_dim_t5=24,
        pooled_projection_dim=16,
        text_len=7,
        text_len_t5=8,
        use_style_cond_and_image_meta_size=style,
    )
    return case("HunyuanDiT2DModel" + "-style" * style, make, inputs)


IMAGE_TRANSFORMERS = [
    case(
        "DiTTransformer2DModel",
        built(
            diffusers.DiTTransformer2DModel,
            **HEADS,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            num_embeds_ada_norm=10,
        ),
        lambda b: {**_tokens(b), "class_labels": torch.tensor([1, 4])[:b]},
    ),
    _pixart(False),
    _pixart(True),
    *[
        case(
            "Transformer2DModel" + "-linear_projection" * linear,
            built(
                diffusers.Transformer2DModel,
                **HEADS,
                in_channels=32,
                num_layers=2,
                norm_num_groups=8,
                cross_attention_dim=24,
                use_linear_projection=linear,
            ),
            lambda b: {"hidden_states": random(b, 32, 8, 8), "encoder_hidden_states": random(b, 7, 24)},
        )
        for linear in (False, True)
    ],
    case("SD3Transformer2DModel-3", _sd3(), _pooled),
    case("SD3Transformer2DModel-3.5", _sd3(qk_norm="rms_norm", dual_attention_layers=(0, 1)), _pooled),
    case(
        "FluxTransformer2DModel",
        built(diffusers.FluxTransformer2DModel, **_FLUX, pooled_projection_dim=16),
        lambda b: {**_packed(b), "pooled_projections": random(b, 16)},
        real=("img_ids", "txt_ids"),
    ),
    case(
        "FluxTransformer2DModel-guidance",
        built(diffusers.FluxTransformer2DModel, **_FLUX, pooled_projection_dim=16, guidance_embeds=True),
        lambda b: {**_packed(b), "pooled_projections": random(b, 16), "guidance": random(b).sigmoid()},
        real=("img_ids", "txt_ids"),
    ),
    case(
        "ChromaTransformer2DModel",
        built(
            diffusers.ChromaTransformer2DModel,
            **_FLUX,
            approximator_num_channels=32,
            approximator_hidden_dim=48,
            approximator_layers=2,
        ),
        _packed,
        real=("img_ids", "txt_ids"),
    ),
    case(
        "Flux2Transformer2DModel",
        built(
            diffusers.Flux2Transformer2DModel,
            **{**_FLUX, "axes_dims_rope": (4, 4, 4, 4)},
            timestep_guidance_channels=32,
        ),
        lambda b: {
            **_packed(b),
            "img_ids": torch.cartesian_prod(*map(torch.arange, (1, 4, 4, 1))).double(),
            "txt_ids": torch.cartesian_prod(*map(torch.arange, (1, 1, 1, 7))).double(),
            "guidance": random(b).sigmoid(),
        },
        real=("img_ids", "txt_ids"),
    ),
    case("SanaTransformer2DModel", built(diffusers.SanaTransformer2DModel, **_SANA, patch_size=1), _text),
    case(
        "SanaTransformer2DModel-guidance",
        built(
            diffusers.SanaTransformer2DModel,
            **_SANA,
            patch_size=2,
            guidance_embeds=True,
            qk_norm="rms_norm_across_heads",
        ),
        lambda b: {**_text(b), "guidance": random(b).sigmoid(), "encoder_attention_mask": text_mask(b)},
    ),
    case(
        "PriorTransformer",
        built(diffusers.PriorTransformer, **HEADS, num_layers=2, embedding_dim=16, num_embeddings=7),
        lambda b: {
            "hidden_states": random(b, 16),
            "timestep": timesteps(b),
            "proj_embedding": random(b, 16, seed=1),
            "encoder_hidden_states": random(b, 7, 16),
            "attention_mask": text_mask(b).bool(),
        },
    ),
    case(
        "AuraFlowTransformer2DModel",
        built(
            diffusers.AuraFlowTransformer2DModel,
            sample_size=8,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=24,
            caption_projection_dim=32,
            pos_embed_max_size=16,
        ),
        lambda b: {**_text(b), "timestep": random(b).sigmoid()},
    ),
    case(
        "QwenImageTransformer2DModel",
        built(
            diffusers.QwenImageTransformer2DModel,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=24,
            axes_dims_rope=(4, 4, 8),
        ),
        lambda b: {
            "hidden_states": random(b, 16, 16),
            "encoder_hidden_states": random(b, 7, 24),
            "encoder_hidden_states_mask": text_mask(b),
            "timestep": random(b).sigmoid(),
            "img_shapes": [[(1, 4, 4)]] * b,
        },
    ),
    _hunyuan_dit(False),
    _hunyuan_dit(True),
    case(
        "Lumina2Transformer2DModel",
        built(diffusers.Lumina2Transformer2DModel, **_LUMINA),
        lambda b: {**_text(b), "timestep": random(b).sigmoid(), "encoder_attention_mask": text_mask(b).bool()},
    ),
    case(
        "ZImageTransformer2DModel",
        built(
            diffusers.ZImageTransformer2DModel,
            in_channels=4,
            dim=64,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=4,
            n_kv_heads=4,
            cap_feat_dim=24,
            axes_dims=[4, 4, 8],
            axes_lens=[128, 64, 64],
        ),
        lambda b: {
            "x": list(random(b, 4, 1, 8, 8)),
            "t": random(b).sigmoid(),
            "cap_feats": list(random(b, 7, 24)),
        },
    ),
]
