"""Tiny transformers of video and of sound of diffusers."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.models.embeddings import get_1d_rotary_pos_embed, get_3d_rotary_pos_embed
from models import Case
from zoo_inputs import HEADS, built, case, random, text_mask, timesteps


def _cogvideox(rotary: bool) -> Case:
    def inputs(b: int) -> dict[str, Any]:
        tables = get_3d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), 3)
        return {
            "hidden_states": random(b, 3, 4, 8, 8),
            "encoder_hidden_states": random(b, 7, 24),
            "timestep": timesteps(b),
            **({"image_rotary_emb": tables} if rotary else {}),
        }

    make = built(
        diffusers.CogVideoXTransformer3DModel,
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=24,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=7,
        use_rotary_positional_embeddings=rotary,
    )
    return case("CogVideoXTransformer3DModel" + "-rotary" * rotary, make, inputs)


def _hunyuan_video(guidance: bool) -> Case:
    make = built(
        diffusers.HunyuanVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        guidance_embeds=guidance,
        text_embed_dim=24,
        pooled_projection_dim=16,
        rope_axes_dim=(4, 4, 8),
    )
    return case(
        "HunyuanVideoTransformer3DModel" + "-guidance" * guidance,
        make,
        lambda b: {
            "hidden_states": random(b, 4, 2, 8, 8),
            "timestep": timesteps(b),
            "encoder_hidden_states": random(b, 7, 24),
            "encoder_attention_mask": text_mask(b),
            "pooled_projections": random(b, 16),
            **({"guidance": random(b).sigmoid()} if guidance else {}),
        },
    )


def _wan(image: bool) -> Case:
    make = built(
        diffusers.WanTransformer3DModel,
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=16,
        **({"image_dim": 16, "added_kv_proj_dim": 48} if image else {}),
    )
    return case(
        "WanTransformer3DModel" + "-image" * image,
        make,
        lambda b: {
            "hidden_states": random(b, 4, 2, 8, 8),
            "timestep": timesteps(b),
            # with an image, the text is what follows the image's tokens; it has 512 of them
            "encoder_hidden_states": random(b, 512 if image else 7, 24),
            **({"encoder_hidden_states_image": random(b, 5, 16)} if image else {}),
        },
    )


VIDEO_TRANSFORMERS = [
    _cogvideox(False),
    _cogvideox(True),
    case(
        "LTXVideoTransformer3DModel",
        built(
            diffusers.LTXVideoTransformer3DModel,
            **HEADS,
            in_channels=8,
            out_channels=8,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=24,
        ),
        lambda b: {
            "hidden_states": random(b, 32, 8),
            "encoder_hidden_states": random(b, 7, 24),
            "timestep": timesteps(b),
            "encoder_attention_mask": text_mask(b),
            "num_frames": 2,
            "height": 4,
            "width": 4,
        },
    ),
    _hunyuan_video(False),
    _hunyuan_video(True),
    _wan(False),
    _wan(True),
    case(
        "MochiTransformer3DModel",
        built(
            diffusers.MochiTransformer3DModel,
            num_attention_heads=4,
            attention_head_dim=16,
            num_layers=2,
            pooled_projection_dim=32,
            in_channels=4,
            text_embed_dim=24,
            time_embed_dim=16,
            max_sequence_length=7,
        ),
        lambda b: {
            "hidden_states": random(b, 4, 2, 8, 8),
            "encoder_hidden_states": random(b, 7, 24),
            "timestep": timesteps(b),
            "encoder_attention_mask": text_mask(b).bool(),
        },
    ),
    case(
        "StableAudioDiTModel",
        built(
            diffusers.StableAudioDiTModel,
            sample_size=12,
            in_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            num_key_value_attention_heads=2,
            out_channels=4,
            cross_attention_dim=32,
            time_proj_dim=16,
            global_states_input_dim=24,
            cross_attention_input_dim=24,
        ),
        lambda b: {
            "hidden_states": random(b, 4, 12),
            "timestep": random(b).sigmoid(),
            "encoder_hidden_states": random(b, 7, 24),
            "global_hidden_states": random(b, 1, 24),
            "rotary_embedding": get_1d_rotary_pos_embed(8, 13, use_real=True, repeat_interleave_real=False),
        },
    ),
]
