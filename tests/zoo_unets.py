"""Tiny UNets and autoencoders of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.uvit_2d import UVit2DModel
from models import Case
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from zoo_inputs import built, case, flat, random, timesteps


def _unet2d(down: str, up: str, **changes: Any) -> Callable[[], nn.Module]:
    config: dict[str, Any] = {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "down_block_types": (down, down),
        "up_block_types": (up, up),
    }
    return built(diffusers.UNet2DModel, **{**config, **changes})


def _image(batch: int) -> dict[str, Any]:
    return {"sample": random(batch, 3, 16, 16), "timestep": timesteps(batch)}


def _latents(batch: int) -> dict[str, Any]:
    return {
        "sample": random(batch, 4, 16, 16),
        "timestep": timesteps(batch),
        "encoder_hidden_states": random(batch, 7, 24),
    }


def _video(batch: int) -> dict[str, Any]:
    return {
        "sample": random(batch, 4, 3, 8, 8),
        "timestep": timesteps(batch),
        "encoder_hidden_states": random(batch, 7, 24),
    }


_CONDITION: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "attention_head_dim": 8,
}


class OwnProcessor:
    """An attention processor as users write them: products spelled out, the scale from the module."""

    def __call__(self, attn: Any, hidden_states: Tensor, **others: Any) -> Tensor:
        b, _, h, w = hidden_states.shape
        x = attn.group_norm(hidden_states.flatten(2)).transpose(1, 2)
        q, k, v = (p(x).reshape(b, h * w, attn.heads, -1).transpose(1, 2) for p in (attn.to_q, attn.to_k, attn.to_v))
        weights = torch.softmax(q @ k.transpose(-1, -2) * attn.scale, dim=-1)
        x = attn.to_out[0]((weights @ v).transpose(1, 2).reshape(b, h * w, -1))
        return (x.transpose(1, 2).reshape(b, -1, h, w) + hidden_states) / attn.rescale_output_factor


def _own_processor() -> nn.Module:
    model: Any = _unet2d("AttnDownBlock2D", "AttnUpBlock2D")()
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(OwnProcessor())
    return model


def _checkpointed() -> nn.Module:
    model: Any = _unet2d("AttnDownBlock2D", "AttnUpBlock2D")()
    model.mid_block = checkpoint_wrapper(model.mid_block)
    return model


def _compiled() -> nn.Module:
    model: Any = _unet2d("AttnDownBlock2D", "AttnUpBlock2D")()
    model.mid_block = torch.compile(model.mid_block, backend="eager")
    return model


UNETS = [
    case("UNet2DModel-Down", _unet2d("DownBlock2D", "UpBlock2D"), _image),
    case("UNet2DModel-Attn", _unet2d("AttnDownBlock2D", "AttnUpBlock2D"), _image),
    case("UNet2DModel-ResnetDownsample", _unet2d("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"), _image),
    case(
        "UNet2DModel-Skip",
        # the skip blocks' resnets have min(channels / 4, 32) groups
        _unet2d("SkipDownBlock2D", "SkipUpBlock2D", block_out_channels=(64, 64)),
        _image,
    ),
    case(
        "UNet2DModel-AttnSkip",
        _unet2d("AttnSkipDownBlock2D", "AttnSkipUpBlock2D", block_out_channels=(64, 64)),
        _image,
    ),
    case("UNet2DModel-own-processor", _own_processor, _image),
    case("UNet2DModel-checkpointed", _checkpointed, _image),
    case("UNet2DModel-compiled", _compiled, _image),
    case("UNet2DModel-fourier", _unet2d("DownBlock2D", "UpBlock2D", time_embedding_type="fourier"), _image),
    case(
        "UNet2DConditionModel-K",
        built(
            diffusers.UNet2DConditionModel,
            **{
                **_CONDITION,
                "block_out_channels": (64, 64),
                "act_fn": "gelu",
                "conv_in_kernel": 1,
                "conv_out_kernel": 1,
                "down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D"),
                "up_block_types": ("KCrossAttnUpBlock2D", "KUpBlock2D"),
                "mid_block_type": None,
                "layers_per_block": 2,
                "time_embedding_type": "fourier",
                "time_embedding_dim": 64,
                "timestep_post_act": "gelu",
                "norm_num_groups": None,
            },
        ),
        _latents,
    ),
    case(
        "UNet2DConditionModel-SimpleCrossAttn",
        built(
            diffusers.UNet2DConditionModel,
            **_CONDITION,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            resnet_time_scale_shift="scale_shift",
        ),
        _latents,
    ),
    case(
        "UNet2DConditionModel-classes",
        built(
            diffusers.UNet2DConditionModel,
            **_CONDITION,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            num_class_embeds=5,
        ),
        lambda b: {**_latents(b), "class_labels": torch.tensor([1, 4])[:b]},
    ),
    case(
        "ControlNetModel",
        built(
            diffusers.ControlNetModel,
            **{k: v for k, v in _CONDITION.items() if k != "sample_size"},
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            conditioning_embedding_out_channels=(16, 32),
        ),
        lambda b: {**_latents(b), "controlnet_cond": random(b, 3, 32, 32)},
    ),
    case(
        "UNet3DConditionModel",
        built(
            diffusers.UNet3DConditionModel,
            **_CONDITION,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        ),
        _video,
    ),
    case(
        "UNetSpatioTemporalConditionModel",
        built(
            diffusers.UNetSpatioTemporalConditionModel,
            sample_size=8,
            in_channels=8,
            # this class has 32 norm groups everywhere
            block_out_channels=(64, 64),
            num_attention_heads=(4, 8),
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            cross_attention_dim=24,
            addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=48,
            layers_per_block=1,
        ),
        lambda b: {
            "sample": random(b, 3, 8, 8, 8),
            "timestep": torch.tensor(3),
            "encoder_hidden_states": random(b, 1, 24),
            "added_time_ids": random(b, 3),
        },
    ),
    case(
        "UNetMotionModel",
        built(
            diffusers.UNetMotionModel,
            **{k: v for k, v in _CONDITION.items() if k != "attention_head_dim"},
            num_attention_heads=4,
            motion_num_attention_heads=4,
            motion_max_seq_length=8,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        ),
        # the text once per frame
        lambda b: {**_video(b), "encoder_hidden_states": random(b * 3, 7, 24)},
    ),
    case(
        "UNet1DModel-dance",
        built(
            diffusers.UNet1DModel,
            sample_size=64,
            extra_in_channels=16,
            time_embedding_type="fourier",
            time_embedding_dim=16,
            sample_rate=16000,
            block_out_channels=(32, 32, 64),
        ),
        lambda b: {"sample": random(b, 2, 64), "timestep": timesteps(b)[:1]},
    ),
    case(
        "UNet1DModel-resnet",
        built(
            diffusers.UNet1DModel,
            in_channels=6,
            out_channels=6,
            time_embedding_type="positional",
            use_timestep_embedding=True,
            act_fn="mish",
            freq_shift=1.0,
            flip_sin_to_cos=False,
            out_block_type="OutConv1DBlock",
            mid_block_type="MidResTemporalBlock1D",
            down_block_types=("DownResnetBlock1D",) * 2,
            up_block_types=("UpResnetBlock1D",),
            block_out_channels=(32, 64),
        ),
        lambda b: {"sample": random(b, 6, 16), "timestep": timesteps(b)},
    ),
    case(
        "StableCascadeUNet-prior",
        built(
            diffusers.models.StableCascadeUNet,
            in_channels=4,
            out_channels=4,
            timestep_ratio_embedding_dim=16,
            conditioning_dim=32,
            block_out_channels=(32, 32),
            num_attention_heads=(4, 4),
            down_num_layers_per_block=(1, 1),
            up_num_layers_per_block=(1, 1),
            clip_text_in_channels=16,
            clip_text_pooled_in_channels=16,
            clip_image_in_channels=16,
            switch_level=(False,),
        ),
        lambda b: {
            "sample": random(b, 4, 8, 8),
            "timestep_ratio": random(b).sigmoid(),
            "clip_text_pooled": random(b, 1, 16),
            "clip_text": random(b, 7, 16),
            "clip_img": random(b, 1, 16),
        },
    ),
    case(
        "StableCascadeUNet-decoder",
        built(
            diffusers.models.StableCascadeUNet,
            in_channels=4,
            out_channels=4,
            timestep_ratio_embedding_dim=16,
            patch_size=2,
            conditioning_dim=32,
            block_out_channels=(32, 64),
            num_attention_heads=(0, 4),
            down_num_layers_per_block=(1, 1),
            up_num_layers_per_block=(1, 1),
            down_blocks_repeat_mappers=(1, 2),
            up_blocks_repeat_mappers=(2, 1),
            block_types_per_layer=(
                ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
                ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
            ),
            clip_text_pooled_in_channels=16,
            effnet_in_channels=8,
            pixel_mapper_in_channels=3,
            timestep_conditioning_type=("sca",),
        ),
        lambda b: {
            "sample": random(b, 4, 16, 16),
            "timestep_ratio": random(b).sigmoid(),
            "clip_text_pooled": random(b, 1, 16),
            "effnet": random(b, 8, 4, 4),
        },
    ),
    case(
        "UVit2DModel",
        built(
            UVit2DModel,
            hidden_size=64,
            cond_embed_dim=16,
            micro_cond_encode_dim=8,
            micro_cond_embed_dim=40,
            encoder_hidden_size=24,
            vocab_size=65,
            codebook_size=60,
            in_channels=32,
            block_out_channels=32,
            num_res_blocks=1,
            downsample=True,
            upsample=True,
            block_num_heads=4,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            sample_size=8,
        ),
        lambda b: {
            "input_ids": torch.arange(b * 64).reshape(b, 8, 8) % 65,
            "encoder_hidden_states": random(b, 7, 24),
            "pooled_text_emb": random(b, 16),
            "micro_conds": random(b, 5),
        },
    ),
]


def _halves(m: Any) -> Tensor:
    return flat([m.encode(random(2, 3, 16, 16)).latents, m.decode(random(2, 4, 8, 8)).sample])


# without example inputs: encode and decode are called apart from one another, so both are traced
AUTOENCODERS = [
    Case(
        "AutoencoderTiny",
        built(
            diffusers.AutoencoderTiny,
            encoder_block_out_channels=(32, 32),
            decoder_block_out_channels=(32, 32),
            num_encoder_blocks=(1, 2),
            num_decoder_blocks=(2, 1),
        ),
        _halves,
    ),
    Case(
        "VQModel",
        built(
            diffusers.VQModel,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(32, 64),
            latent_channels=4,
            num_vq_embeddings=32,
            norm_num_groups=8,
            sample_size=16,
        ),
        _halves,
    ),
]
