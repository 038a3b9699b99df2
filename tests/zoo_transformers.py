"""Tiny models of the library transformers: text, images and sound, encoders and decoders."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from models import Case
from torch import Tensor, nn
from zoo_inputs import Inputs, case, random, text_mask


def _case(name: str, config: Any, inputs: Inputs, kind: Any = transformers.AutoModel) -> Case:
    """A model made from its config, by an ``Auto`` class or its own."""

    def make() -> nn.Module:
        return kind.from_config(config) if hasattr(kind, "_model_mapping") else kind(config)

    return case(name, make, inputs)


def _ids(batch: int) -> dict[str, Tensor]:
    return {"input_ids": torch.arange(2 * 7).reshape(2, 7)[:batch] + 3, "attention_mask": text_mask(batch)}


def _decoded(batch: int) -> dict[str, Any]:
    return {**_ids(batch), "use_cache": False}


def _pixels(batch: int) -> dict[str, Tensor]:
    return {"pixel_values": random(batch, 3, 32, 32)}


_TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
_LLAMA: dict[str, Any] = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
_IMAGE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
_SOUND: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}
_LM = transformers.AutoModelForCausalLM


def _sound(batch: int) -> dict[str, Tensor]:
    return {"input_values": random(batch, 400)}


TRANSFORMERS = [
    _case("BertModel", transformers.BertConfig(**_TEXT), _ids),
    _case("RobertaModel", transformers.RobertaConfig(**{**_TEXT, "pad_token_id": 1}), _ids),
    _case(
        "DistilBertModel",
        transformers.DistilBertConfig(
            vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=32
        ),
        _ids,
    ),
    _case("AlbertModel", transformers.AlbertConfig(**_TEXT, embedding_size=16), _ids),
    _case("ElectraModel", transformers.ElectraConfig(**_TEXT, embedding_size=16), _ids),
    _case(
        "DebertaV2Model",
        transformers.DebertaV2Config(**_TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"]),
        _ids,
    ),
    _case("MPNetModel", transformers.MPNetConfig(**{**_TEXT, "pad_token_id": 1}), _ids),
    _case("ModernBertModel", transformers.ModernBertConfig(**_TEXT), _ids),
    _case(
        "T5EncoderModel",
        transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
        _ids,
        transformers.T5EncoderModel,
    ),
    _case(
        "BartEncoder",
        transformers.BartConfig(
            vocab_size=64,
            d_model=32,
            encoder_layers=2,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=32,
            pad_token_id=0,
        ),
        _ids,
        transformers.models.bart.modeling_bart.BartEncoder,
    ),
    _case(
        "GPT2LMHeadModel",
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32),
        _decoded,
        _LM,
    ),
    _case(
        "OPTForCausalLM",
        transformers.OPTConfig(
            **{k: v for k, v in _TEXT.items() if k != "intermediate_size"}, ffn_dim=64, word_embed_proj_dim=32
        ),
        _decoded,
        _LM,
    ),
    _case("LlamaForCausalLM", transformers.LlamaConfig(**_LLAMA), _decoded, _LM),
    _case("MistralForCausalLM", transformers.MistralConfig(**_LLAMA), _decoded, _LM),
    _case(
        "MixtralForCausalLM",
        transformers.MixtralConfig(**_LLAMA, num_local_experts=4, experts_implementation="eager"),
        _decoded,
        _LM,
    ),
    _case("Qwen2ForCausalLM", transformers.Qwen2Config(**_LLAMA), _decoded, _LM),
    _case("Qwen3ForCausalLM", transformers.Qwen3Config(**_LLAMA), _decoded, _LM),
    _case("GemmaForCausalLM", transformers.GemmaConfig(**_LLAMA), _decoded, _LM),
    _case("Gemma2ForCausalLM", transformers.Gemma2Config(**_LLAMA, query_pre_attn_scalar=8), _decoded, _LM),
    _case("PhiForCausalLM", transformers.PhiConfig(**_TEXT), _decoded, _LM),
    _case(
        "FalconForCausalLM",
        transformers.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
        _decoded,
        _LM,
    ),
    _case("GPTNeoXForCausalLM", transformers.GPTNeoXConfig(**_TEXT), _decoded, _LM),
    _case(
        "BloomForCausalLM", transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4), _decoded, _LM
    ),
    _case("CLIPTextModel", transformers.CLIPTextConfig(**_TEXT), _ids, transformers.CLIPTextModel),
    _case("CLIPVisionModel", transformers.CLIPVisionConfig(**_IMAGE), _pixels, transformers.CLIPVisionModel),
    _case("SiglipVisionModel", transformers.SiglipVisionConfig(**_IMAGE), _pixels, transformers.SiglipVisionModel),
    _case("ViTModel", transformers.ViTConfig(**_IMAGE), _pixels),
    _case("DeiTModel", transformers.DeiTConfig(**_IMAGE), _pixels),
    _case("BeitModel", transformers.BeitConfig(**_IMAGE), _pixels),
    _case(
        "Dinov2Model",
        transformers.Dinov2Config(**{k: v for k, v in _IMAGE.items() if k != "intermediate_size"}, mlp_ratio=2),
        _pixels,
    ),
    _case(
        "SwinModel",
        transformers.SwinConfig(
            image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
        ),
        _pixels,
    ),
    _case(
        "ConvNextModel",
        transformers.ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 2], num_stages=2, patch_size=2),
        _pixels,
    ),
    _case("ResNetModel", transformers.ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 2]), _pixels),
    _case(
        "SegformerModel",
        transformers.SegformerConfig(
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[16, 32],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[2, 4],
            mlp_ratios=[2, 2],
        ),
        _pixels,
    ),
    _case("MobileNetV2Model", transformers.MobileNetV2Config(depth_multiplier=0.25, image_size=32), _pixels),
    _case("Wav2Vec2Model", transformers.Wav2Vec2Config(**_SOUND, num_feat_extract_layers=2), _sound),
    _case("HubertModel", transformers.HubertConfig(**_SOUND, num_feat_extract_layers=2), _sound),
    _case(
        "WhisperEncoder",
        transformers.WhisperConfig(
            d_model=32,
            encoder_layers=2,
            encoder_attention_heads=4,
            encoder_ffn_dim=64,
            num_mel_bins=8,
            max_source_positions=10,
        ),
        lambda b: {"input_features": random(b, 8, 20)},
        transformers.models.whisper.modeling_whisper.WhisperEncoder,
    ),
]
