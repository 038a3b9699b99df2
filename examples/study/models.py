"""The study's models, and what each of them is trained on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from data import flipped, photo_patches
from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from digits.data import SIZE, digits, shifted

HERE = Path(__file__).parent
CLASSES, TOKENS, TOKEN_DIM = 10, 4, 32


def photos_model() -> UNet2DModel:
    """1.6M parameters; attention at 8x8, in both directions and in the middle."""
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(48, 96),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=8,
    )


def dit_model() -> DiTTransformer2DModel:
    """2.1M parameters; six blocks of four heads of 32 dims, on 8x8 patches of 2x2 pixels, by label."""
    return DiTTransformer2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        patch_size=2,
        num_layers=6,
        num_attention_heads=4,
        attention_head_dim=32,
        num_embeds_ada_norm=CLASSES,
    )


def crossattn_model() -> UNet2DConditionModel:
    """1M parameters; transformer blocks with GEGLU, which look at four tokens of the digit's class."""
    return UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TOKEN_DIM,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def no_condition(labels: Tensor) -> dict[str, Tensor]:
    """For models that make any image."""
    return {}


def class_labels(labels: Tensor) -> dict[str, Tensor]:
    """For models that embed the label themselves."""
    return {"class_labels": labels}


def class_tokens(labels: Tensor) -> dict[str, Tensor]:
    """Four tokens for each class, random but always the same: what a text encoder would say."""
    tokens = torch.randn(CLASSES, TOKENS, TOKEN_DIM, generator=torch.Generator().manual_seed(0))
    return {"encoder_hidden_states": tokens[labels]}


@dataclass(frozen=True)
class Subject:
    """One model of the study.

    new: the untrained model. data: the images, with labels, to train on and those held out. augmented: what every
    image goes through when it is trained on. condition: labels to the model's further inputs. passes: how often each
    held-out image is used for the loss. weights: where the trained model is. images: forward's name for the images.
    """

    name: str
    new: Callable[[], Any]
    data: Callable[[], tuple[Any, Any]]
    augmented: Callable[..., Tensor]
    condition: Callable[[Tensor], dict[str, Tensor]]
    weights: Path
    passes: int = 4
    batch: int = 32
    images: str = "sample"

    def load(self) -> tuple[Any, DDPMScheduler]:
        """The trained model in float32 and its scheduler."""
        kind = type(self.new())
        model = kind.from_pretrained(self.weights, torch_dtype=torch.float32)
        return model.eval(), DDPMScheduler.from_pretrained(self.weights)

    def example(self, model: Any) -> dict[str, Any]:
        """What the model's forward can be called with."""
        images = torch.zeros(2, model.config.in_channels, SIZE, SIZE)
        t = torch.zeros(2, dtype=torch.long)
        return {self.images: images, "timestep": t, **self.condition(torch.zeros(2, dtype=torch.long))}

    def batch_of(self, images: Tensor, labels: Tensor) -> Any:
        """What a loader yields: images alone, or a dict that names the model's further inputs."""
        conditioning = self.condition(labels)
        return {"images": images, **conditioning} if conditioning else images


@dataclass(frozen=True)
class Loader:
    """Endless batches, as the model was trained on them; every walk begins anew, with the same draws.

    data: images with labels. batches: how many batches a walk has.
    """

    subject: Subject
    data: Any
    batch: int
    seed: int
    batches: int = 1 << 20

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.batches):
            chosen = torch.randint(0, len(self.data), (self.batch,), generator=generator)
            images = self.subject.augmented(self.data.images[chosen], generator=generator)
            yield self.subject.batch_of(images, self.data.labels[chosen])


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def digits_model() -> UNet2DModel:
    """The demo's model: 2.5M parameters."""
    return UNet2DModel.from_config(UNet2DModel.load_config(HERE.parent / "digits" / "model"))


MODELS = HERE / "models"
SUBJECTS = {
    s.name: s
    for s in (
        Subject("digits", digits_model, digits, shifted, no_condition, HERE.parent / "digits" / "model", batch=64),
        Subject("photos", photos_model, photo_patches, flipped, no_condition, MODELS / "photos", passes=1),
        Subject("dit", dit_model, digits, shifted, class_labels, MODELS / "dit", images="hidden_states"),
        Subject("crossattn", crossattn_model, digits, shifted, class_tokens, MODELS / "crossattn"),
    )
}
