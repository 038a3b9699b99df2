"""Small models that Torch-Pruning can prune, with gradients: each has one thing that it treats apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn


class Residual(nn.Module):
    """Convolutions with batch norms, a shortcut, a concat and a flattened head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.one, self.norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.two, self.side = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.joined = nn.Conv2d(24, 12, 3, padding=1)
        self.head = nn.Linear(12 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.two(torch.relu(self.norm(self.one(x))))
        x = self.joined(torch.cat([x, self.side(x)], 1))
        return self.head(torch.nn.functional.adaptive_avg_pool2d(torch.relu(x), 4).flatten(1))


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(), nn.ConvTranspose2d(16, 12, 2, stride=2), nn.ReLU(),
        nn.GroupNorm(3, 12), nn.Conv2d(12, 4, 1),
    )  # fmt: skip


def normed() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 16), nn.PReLU(16), nn.Linear(16, 3)
    )


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], layer_type="bottleneck", num_labels=4
    )
    return ResNetForImageClassification(config)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8
    )
    return ViTForImageClassification(config)


def unet() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """build: the model. inputs: one call of it. last: the layers whose outputs stay, by name."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    last: tuple[str, ...]

    def make(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
        """The model with gradients of a loss, and its inputs: the same at every call."""
        torch.manual_seed(0)
        model, inputs = self.build().eval(), self.inputs()
        if dtype != torch.float32:
            model = model.to(dtype)
        torch.manual_seed(1)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        return model, inputs

    def ignored(self, model: nn.Module) -> list[nn.Module]:
        return [model.get_submodule(name) for name in self.last]

    def graph(self, model: nn.Module, inputs: Any) -> Any:
        return tp.DependencyGraph().build_dependency(model, inputs, verbose=False)

    def groups(self, model: nn.Module, inputs: Any) -> list[Any]:
        return list(self.graph(model, inputs).get_all_groups(ignored_layers=self.ignored(model)))


def images(size: int, channels: int = 3) -> Callable[[], Tensor]:
    return lambda: torch.linspace(-1, 1, channels * size * size).reshape(1, channels, size, size)


CASES = {
    "residual": Case(Residual, images(8), ("head",)),
    "grouped": Case(grouped, images(8), ("9",)),
    "normed": Case(normed, lambda: torch.linspace(-1, 1, 12).reshape(2, 6), ("5",)),
    "resnet": Case(resnet, images(32), ("classifier.1",)),
    "vit": Case(vit, images(16), ("classifier",)),
    "unet": Case(unet, lambda: {"sample": images(16)(), "timestep": torch.zeros(1)}, ("conv_out",)),
}
