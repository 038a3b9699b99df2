"""What denoisers of diffusers are told beside the noisy images, class by class."""

from __future__ import annotations

from collections.abc import Mapping

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time")


# What UNet2DConditionModel looks up in added_cond_kwargs, by config.addition_embed_type.
ADDED_KEYS: Mapping[str, tuple[str, ...]] = {
    "text_time": ("text_embeds", "time_ids"),
    "image": ("image_embeds",),
    "text_image": ("text_embeds", "image_embeds"),
    "image_hint": ("image_embeds", "hint"),
}


# Config entries that say that a transformer works on text, although its forward calls the text optional.
NEEDED_BY_CONFIG = {
    "cross_attention_dim": "encoder_hidden_states",
    "joint_attention_dim": "encoder_hidden_states",
    "caption_channels": "encoder_hidden_states",
    "pooled_projection_dim": "pooled_projections",
}


# Flow-matching transformers that are told sigma, where others are told sigma * 1000 (their pipelines divide by 1000).
TOLD_SIGMA = ("Flux", "Chroma", "QwenImage", "OvisImage", "LongCatImage", "AuraFlow", "NucleusMoEImage", "Krea2")


# Their embedding of the time takes its dtype from the time itself.
FLOAT_TIME = ("HunyuanDiT",)


# Their time and velocity run the other way: the loss below would be wrong.
REVERSED = ("Lumina", "ZImage")
