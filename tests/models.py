"""Small models for tests: diffusers classes with tiny configs, and plain modules that show one trait each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A model, how to run it to one tensor, and the inputs to trace it with (None: made by themselves)."""

    name: str
    make: Callable[[], nn.Module]
    run: Callable[[nn.Module], Tensor]
    example_inputs: tuple[Any, ...] | None = None


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def cifar_unet(**changes: Any) -> UNet2DModel:
    """google/ddpm-cifar10-32's structure."""
    config: dict[str, Any] = {
        "sample_size": 32,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (128, 256, 256, 256),
        "layers_per_block": 2,
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**{**config, **changes})


def small_unet(**changes: Any) -> UNet2DModel:
    config: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**{**config, **changes})


def small_condition_unet(**changes: Any) -> UNet2DConditionModel:
    config: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "cross_attention_dim": 24,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**{**config, **changes})


def small_vae(**changes: Any) -> AutoencoderKL:
    config: dict[str, Any] = {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (32, 64),
        "norm_num_groups": 8,
        "sample_size": 16,
        "latent_channels": 4,
    }
    return AutoencoderKL(**{**config, **changes})


class ResidualCNN(nn.Module):
    """BatchNorm, a strided shortcut, a depthwise convolution, a concat, pooling and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 32, 3, padding=1, groups=16)
        self.pointwise = nn.Conv2d(32, 16, 1)
        self.shortcut = nn.Conv2d(16, 24, 1, stride=2)
        self.main = nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False)
        self.head = nn.Linear(24 + 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn(self.stem(x)))
        h = h + self.pointwise(F.relu(self.depthwise(h)))
        low = F.relu_(self.main(h) + self.shortcut(h))
        both = torch.cat([low, F.avg_pool2d(h, 2)], dim=1)
        return self.head(F.adaptive_avg_pool2d(both, 1).flatten(1))


class GroupedCNN(nn.Module):
    """Grouped convolutions, a channel split into halves, a channel shuffle and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 32, 3, padding=1)
        self.grouped = nn.Conv2d(32, 64, 3, padding=1, groups=4)
        self.left = nn.Conv2d(32, 16, 1)
        self.right = nn.Conv2d(32, 16, 1)
        self.mixed = nn.Conv2d(16, 24, 1, groups=2)
        self.up = nn.ConvTranspose2d(24, 24, 2, stride=2, groups=2)
        self.out = nn.Conv2d(24, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.grouped(F.silu(self.conv_in(x))).chunk(2, dim=1)
        h = self.left(a) * torch.sigmoid(self.right(b))
        h = F.channel_shuffle(self.mixed(h), 2)
        return self.out(F.silu(self.up(h)))


class PixelShuffler(nn.Module):
    """Sub-pixel upsampling by the op and by hand, space-to-depth, and a flatten into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 48, 3, padding=1)
        self.conv3 = nn.Conv2d(12, 8, 3, padding=1)
        self.down = nn.Conv2d(32, 6, 1)
        self.fc = nn.Linear(6 * 16 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(F.pixel_shuffle(self.conv1(x), 2))
        h = self.conv2(h)
        b, c, height, width = h.shape
        h = h.reshape(b, c // 4, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
        h = self.conv3(h.reshape(b, c // 4, height * 2, width * 2))
        h = self.down(F.pixel_unshuffle(h, 2))
        return self.fc(h[:, :, :16, :16].flatten(1))


class Block(nn.Module):
    """Pre-norm attention (head size from the projection) and a GEGLU."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim, elementwise_affine=False)
        self.qkv = nn.ModuleList(nn.Linear(dim, dim) for _ in range(3))
        self.out = nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in self.qkv)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(h)
        value, gate = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(value * F.gelu(gate))


class Transformer(nn.Module):
    """Token and position embeddings, blocks, and an output projection tied to the token embedding."""

    def __init__(self, dim: int = 32, heads: int = 4, depth: int = 2, vocabulary: int = 50) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, dim)
        self.positions = nn.Parameter(torch.randn(1, 12, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, vocabulary, bias=False)
        self.out.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.tokens(ids) + self.positions[:, : ids.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.out(self.norm(h))


class ExplicitAttention(nn.Module):
    """Attention by matrix products with a stored scale, and a fused projection."""

    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.proj_in = nn.Linear(6, dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.proj_in(x)
        b, n, _ = h.shape
        q, k, v = (t.reshape(b, n, self.heads, -1).permute(0, 2, 1, 3) for t in self.qkv(h).chunk(3, dim=-1))
        weights = (q @ k.transpose(-1, -2) * self.scale).softmax(-1)
        return self.out((weights @ v).permute(0, 2, 1, 3).reshape(b, n, -1))


_t = torch.tensor([3, 500])
_ids = torch.arange(24).reshape(2, 12) % 50


def _vae(m: Any) -> Tensor:
    moments = m.encode(_x(2, 3, 16, 16)).latent_dist.parameters
    return torch.cat([moments.flatten(1), m.decode(_x(2, 4, 8, 8)).sample.flatten(1)], dim=1)


CASES = [
    Case("UNet2DModel-1head", lambda: small_unet(attention_head_dim=None), lambda m: m(_x(2, 3, 16, 16), _t).sample),
    Case("UNet2DModel-heads", small_unet, lambda m: m(_x(2, 3, 16, 16), _t).sample),
    Case(
        "UNet2DModel-classes-scale_shift",
        lambda: small_unet(num_class_embeds=5, resnet_time_scale_shift="scale_shift"),
        lambda m: m(_x(2, 3, 16, 16), _t, class_labels=torch.tensor([1, 4])).sample,
    ),
    Case(
        "UNet2DModel-resnet-sampling",
        lambda: small_unet(downsample_type="resnet", upsample_type="resnet"),
        lambda m: m(_x(2, 3, 16, 16), _t).sample,
    ),
    Case(
        "UNet2DConditionModel",
        small_condition_unet,
        lambda m: m(_x(2, 4, 16, 16), _t, _x(2, 7, 24)).sample,
    ),
    Case(
        "UNet2DConditionModel-linear_projection",
        lambda: small_condition_unet(use_linear_projection=True, transformer_layers_per_block=2),
        lambda m: m(_x(2, 4, 16, 16), _t, _x(2, 7, 24)).sample,
    ),
    Case(
        "UNet2DConditionModel-text_time",
        lambda: small_condition_unet(
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=8 * 6 + 16,
        ),
        lambda m: (
            m(
                _x(2, 4, 16, 16),
                _t,
                _x(2, 7, 24),
                added_cond_kwargs={"text_embeds": _x(2, 16), "time_ids": _x(2, 6)},
            ).sample
        ),
    ),
    Case("AutoencoderKL", small_vae, _vae),
    Case(
        "AutoencoderKL-no-quant_conv",
        lambda: small_vae(use_quant_conv=False, use_post_quant_conv=False),
        _vae,
    ),
    Case("ResidualCNN", ResidualCNN, lambda m: m(_x(2, 3, 16, 16)), (torch.empty(1, 3, 16, 16),)),
    Case("GroupedCNN", GroupedCNN, lambda m: m(_x(2, 3, 8, 8)), (torch.empty(1, 3, 8, 8),)),
    Case("PixelShuffler", PixelShuffler, lambda m: m(_x(2, 3, 8, 8)), (torch.empty(1, 3, 8, 8),)),
    Case("Transformer", Transformer, lambda m: m(_ids), (_ids,)),
    Case("ExplicitAttention", ExplicitAttention, lambda m: m(_x(2, 5, 6)), (torch.empty(1, 5, 6),)),
]
