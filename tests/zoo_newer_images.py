"""Tiny transformers of images of diffusers, those of its newer versions."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from zoo_inputs import HEADS, built, case, random, text_mask, timesteps


def _tokens(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": random(batch, 4, 8, 8),
        "timestep": timesteps(batch),
        "encoder_hidden_states": random(batch, 7, 24),
    }


def _grid(*sizes: int) -> torch.Tensor:
    """Positions, (tokens, axes)."""
    return torch.cartesian_prod(*[torch.arange(n) for n in sizes]).double()


def _packed(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": random(batch, 16, 8),
        "encoder_hidden_states": random(batch, 7, 24),
        "timestep": random(batch).sigmoid(),
        "img_ids": _grid(1, 4, 4),
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
_IDS = ("img_ids", "txt_ids")
_QWEN: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 4, 8),
}


def _qwen(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": random(batch, 16, 16),
        "encoder_hidden_states": random(batch, 7, 24),
        "encoder_hidden_states_mask": text_mask(batch),
        "timestep": random(batch).sigmoid(),
        "img_shapes": [[(1, 4, 4)]] * batch,
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

NEWER_IMAGES = [
    case(
        "HiDreamImageTransformer2DModel",
        built(
            diffusers.HiDreamImageTransformer2DModel,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=4,
            caption_channels=[24, 20],
            text_emb_dim=16,
            num_routed_experts=4,
            num_activated_experts=2,
            axes_dims_rope=(8, 4, 4),
            max_resolution=(8, 8),
            llama_layers=(0, 1),
        ),
        lambda b: {
            "hidden_states": random(b, 4, 8, 8),
            "timesteps": timesteps(b),
            "encoder_hidden_states_t5": random(b, 7, 24),
            "encoder_hidden_states_llama3": random(2, b, 7, 20),
            "pooled_embeds": random(b, 16),
        },
    ),
    case(
        "HunyuanImageTransformer2DModel",
        built(
            diffusers.HunyuanImageTransformer2DModel,
            in_channels=4,
            out_channels=4,
            num_attention_heads=4,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=24,
            rope_axes_dim=(8, 8),
        ),
        lambda b: {**_tokens(b), "timestep": timesteps(b).double(), "encoder_attention_mask": text_mask(b)},
    ),
    case(
        "BriaTransformer2DModel",
        built(diffusers.BriaTransformer2DModel, **_FLUX),
        _packed,
        real=_IDS,
    ),
    case(
        "BriaFiboTransformer2DModel",
        built(diffusers.BriaFiboTransformer2DModel, **_FLUX | {"joint_attention_dim": 24}, text_encoder_dim=12),
        lambda b: {**_packed(b), "text_encoder_layers": [random(b, 7, 12)] * 4},
        real=_IDS,
    ),
    case(
        "LongCatImageTransformer2DModel",
        built(diffusers.LongCatImageTransformer2DModel, **_FLUX, pooled_projection_dim=24),
        _packed,
        real=_IDS,
    ),
    case(
        "OvisImageTransformer2DModel",
        built(diffusers.OvisImageTransformer2DModel, **_FLUX, out_channels=8),
        _packed,
        real=_IDS,
    ),
    case(
        "PRXTransformer2DModel",
        built(
            diffusers.PRXTransformer2DModel,
            in_channels=4,
            context_in_dim=24,
            hidden_size=64,
            mlp_ratio=2.0,
            num_heads=4,
            depth=2,
            axes_dim=[8, 8],
        ),
        lambda b: {**_tokens(b), "attention_mask": text_mask(b).bool()},
    ),
    case(
        "ErnieImageTransformer2DModel",
        built(
            diffusers.ErnieImageTransformer2DModel,
            hidden_size=64,
            num_attention_heads=4,
            num_layers=2,
            ffn_hidden_size=96,
            in_channels=4,
            out_channels=4,
            text_in_dim=24,
            rope_axes_dim=(4, 4, 8),
        ),
        lambda b: {
            "hidden_states": random(b, 4, 8, 8),
            "timestep": timesteps(b),
            "text_bth": random(b, 7, 24),
            "text_lens": torch.tensor([7, 5])[:b],
        },
    ),
    case(
        "GlmImageTransformer2DModel",
        built(
            diffusers.GlmImageTransformer2DModel,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            text_embed_dim=24,
            time_embed_dim=16,
            condition_dim=8,
            prior_vq_quantizer_codebook_size=32,
        ),
        lambda b: {
            **_tokens(b),
            "prior_token_id": torch.arange(b * 16).reshape(b, 16),
            "prior_token_drop": torch.zeros(b, 16, dtype=torch.bool),
            "target_size": torch.full((b, 2), 64.0).double(),
            "crop_coords": torch.zeros(b, 2).double(),
        },
    ),
    case(
        "Krea2Transformer2DModel",
        built(
            diffusers.Krea2Transformer2DModel,
            in_channels=8,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=96,
            timestep_embed_dim=16,
            text_hidden_dim=32,
            num_text_layers=3,
            text_num_attention_heads=4,
            text_num_key_value_heads=4,
            text_intermediate_size=48,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 4, 8),
        ),
        lambda b: {
            "hidden_states": random(b, 16, 8),
            "encoder_hidden_states": random(b, 7, 3, 32),
            "timestep": random(b).sigmoid(),
            "position_ids": torch.cat([torch.zeros(7, 3), _grid(1, 4, 4)]),
        },
        real=("position_ids",),
    ),
    case(
        "NucleusMoEImageTransformer2DModel",
        built(
            diffusers.NucleusMoEImageTransformer2DModel,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            num_key_value_heads=2,
            joint_attention_dim=24,
            axes_dims_rope=(4, 4, 8),
            dense_moe_strategy="leave_first_block_dense",
            num_experts=4,
            moe_intermediate_dim=32,
            capacity_factors=2.0,
        ),
        _qwen,
    ),
    case(
        "DreamLiteUNetModel",
        built(
            diffusers.DreamLiteUNetModel,
            sample_size=8,
            down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
            up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
            block_out_channels=(32, 64),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=24,
            attention_head_dim=8,
            ff_mult=2,
        ),
        lambda b: {"sample": random(b, 4, 8, 8), "timestep": timesteps(b), "encoder_hidden_states": random(b, 7, 24)},
    ),
    case(
        "FluxControlNetModel",
        built(diffusers.FluxControlNetModel, **_FLUX, pooled_projection_dim=16),
        lambda b: {**_packed(b), "controlnet_cond": random(b, 16, 8, seed=1), "pooled_projections": random(b, 16)},
        real=_IDS,
    ),
    case(
        "QwenImageControlNetModel",
        built(diffusers.QwenImageControlNetModel, **_QWEN),
        lambda b: {**_qwen(b), "controlnet_cond": random(b, 16, 16, seed=1)},
    ),
    case(
        "SanaControlNetModel",
        built(diffusers.SanaControlNetModel, **_SANA),
        lambda b: {**_tokens(b), "controlnet_cond": random(b, 4, 8, 8, seed=1)},
    ),
    case(
        "ControlNetUnionModel",
        built(
            diffusers.ControlNetUnionModel,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            block_out_channels=(32, 64),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=24,
            attention_head_dim=8,
            conditioning_embedding_out_channels=(8, 16),
            num_control_type=2,
            num_trans_channel=32,
            num_trans_head=4,
            num_proj_channel=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64,
        ),
        lambda b: {
            "sample": random(b, 4, 8, 8),
            "timestep": timesteps(b),
            "encoder_hidden_states": random(b, 7, 24),
            "controlnet_cond": [random(b, 3, 16, 16)],
            "control_type": torch.tensor([[1.0, 0.0]]).double().expand(b, 2),
            "control_type_idx": [0],
            "added_cond_kwargs": {"text_embeds": random(b, 16), "time_ids": random(b, 6)},
        },
    ),
    case(
        "UNetControlNetXSModel",
        built(
            diffusers.UNetControlNetXSModel,
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(32, 64),
            norm_num_groups=8,
            cross_attention_dim=24,
            num_attention_heads=4,
            ctrl_conditioning_embedding_out_channels=(8, 16),
            ctrl_block_out_channels=(16, 16),
            ctrl_num_attention_heads=2,
            ctrl_max_norm_num_groups=4,
        ),
        lambda b: {
            "sample": random(b, 4, 8, 8),
            "timestep": timesteps(b),
            "encoder_hidden_states": random(b, 7, 24),
            "controlnet_cond": random(b, 3, 16, 16),
        },
    ),
    case(
        "QwenImage21Transformer2DModel",
        built(
            diffusers.QwenImage21Transformer2DModel,
            in_channels=8,
            out_channels=8,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            context_in_dim=24,
            mlp_ratio=2,
            axes_dims_rope=(4, 4, 8),
        ),
        lambda b: {
            "hidden_states": random(b, 16, 8),
            "encoder_hidden_states": random(b, 7, 24),
            "timestep": random(b).sigmoid(),
            "img_shapes": [[(1, 4, 4)]] * b,
            "img_mask": torch.cat([torch.zeros(7), torch.ones(4)]).bool().expand(b, 11),
        },
    ),
]
