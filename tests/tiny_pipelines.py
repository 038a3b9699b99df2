"""Small random pipelines of diffusers, complete with text encoders and tokenizers made on the spot."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

TOKENS = 20
WORDS = ["a", "red", "green", "small", "large", "cat", "house", "tree"]


def clip_tokenizer() -> CLIPTokenizer:
    """Every letter is a token."""
    letters = sorted(set("".join(WORDS)))
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS)


def t5_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TOKENS
    )


def clip(tokenizer: Any, projection: bool = False, width: int = 16) -> Any:
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=32, projection_dim=width, num_attention_heads=2, num_hidden_layers=2,
        vocab_size=len(tokenizer), max_position_embeddings=TOKENS, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5(width: int = 16) -> Any:
    config = T5Config(
        vocab_size=3 + len(WORDS), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return T5EncoderModel(config).eval()


def kl(latent_channels: int = 4, **changes: Any) -> Any:
    """Halves the size."""
    config = {
        "block_out_channels": (16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": latent_channels,
        "norm_num_groups": 4,
        "sample_size": 16,
        **changes,
    }
    return diffusers.AutoencoderKL(**config).eval()


BLOCKS = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 8,
}


def _unet(**changes: Any) -> Any:
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    config = {**BLOCKS, "down_block_types": down, "up_block_types": up, "attention_head_dim": 8, **changes}
    return diffusers.UNet2DModel(**config)


def _text_unet(**changes: Any) -> Any:
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    config = {
        **BLOCKS,
        "down_block_types": down,
        "up_block_types": up,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        **changes,
    }
    return diffusers.UNet2DConditionModel(**config)


def ddpm(**changes: Any) -> Any:
    return diffusers.DDPMPipeline(unet=_unet(sample_size=16, **changes), scheduler=diffusers.DDPMScheduler())


def ldm() -> Any:
    vqvae = diffusers.VQModel(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        num_vq_embeddings=16,
        norm_num_groups=4,
        sample_size=16,
    )
    unet = _unet(in_channels=3, out_channels=3)
    return diffusers.LDMPipeline(vqvae=vqvae.eval(), unet=unet, scheduler=diffusers.DDIMScheduler())


def stable_diffusion() -> Any:
    tokenizer = clip_tokenizer()
    return diffusers.StableDiffusionPipeline(
        unet=_text_unet(),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, prediction_type="v_prediction"),
        vae=kl(),
        text_encoder=clip(tokenizer),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    one, two = clip_tokenizer(), clip_tokenizer()
    unet = _text_unet(
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=kl(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 2.0, 1.0]),
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(),
        text_encoder=clip(one),
        tokenizer=one,
        text_encoder_2=clip(two, projection=True),
        tokenizer_2=two,
        add_watermarker=False,
    )


def sd3() -> Any:
    tokenizer, words = clip_tokenizer(), t5_tokenizer()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl(8, scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(tokenizer, projection=True),
        tokenizer=tokenizer,
        text_encoder_2=clip(tokenizer, projection=True),
        tokenizer_2=tokenizer,
        text_encoder_3=t5(32),
        tokenizer_3=words,
    )


def flux() -> Any:
    tokenizer = clip_tokenizer()
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=kl(4, scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5(32),
        tokenizer_2=t5_tokenizer(),
    )


def dit(vae: Any = None) -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,  # half of them a learned variance
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_embeds_ada_norm=1000,
        norm_elementwise_affine=False,
    )
    return diffusers.DiTPipeline(transformer=transformer, vae=vae or kl(), scheduler=diffusers.DDIMScheduler())


def pixart() -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        cross_attention_dim=32,
        caption_channels=32,
        norm_elementwise_affine=False,
    )
    return diffusers.PixArtAlphaPipeline(
        transformer=transformer,
        vae=kl(),
        scheduler=diffusers.DDPMScheduler(),
        text_encoder=t5(32),
        tokenizer=t5_tokenizer(),
    )


PIPELINES = {f.__name__: f for f in (ddpm, ldm, stable_diffusion, sdxl, sd3, flux, dit, pixart)}


def made(name: str, **changes: Any) -> Any:
    """A pipeline with random weights, the same every time; also where models begin with zeros."""
    torch.manual_seed(0)
    pipe = PIPELINES[name](**changes)
    with torch.no_grad():
        for model in (m for m in pipe.components.values() if isinstance(m, nn.Module)):
            for p in model.eval().parameters():
                p.add_(torch.randn_like(p), alpha=0.02)
    pipe.set_progress_bar_config(disable=True)
    return pipe
