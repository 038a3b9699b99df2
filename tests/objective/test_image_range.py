"""Images from 0 to 1 for a model that was trained on -1 to 1."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from diffprune_fast import finetune, score, trace
from diffprune_fast.compensation import compensate
from diffprune_fast.evaluation import diffusion_loss
from diffprune_fast.objective import image_range, make_objective
from diffprune_fast.objective.image_range import check_range_by_loss

SCHEDULER = DDPMScheduler()


class OfBlackAndWhite(nn.Module):
    """The best there is for images of -1 and 1: of what it sees it takes the sign for the image, the rest for noise."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 1, bias=False), nn.Conv2d(8, 1, 1, bias=False)
        with torch.no_grad():
            self.first.weight.fill_(1)
            self.last.weight.fill_(1 / 8)
        self.register_buffer("kept", SCHEDULER.alphas_cumprod.clone())

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        kept = self.kept[timestep].view(-1, 1, 1, 1)
        image = torch.tanh(100 * self.last(self.first(sample)))
        return (sample - kept.sqrt() * image) / (1 - kept).sqrt()


def black_and_white(n: int = 16) -> Tensor:
    return torch.randint(0, 2, (n, 1, 4, 4), generator=torch.Generator().manual_seed(0)).float()


def scored(model: nn.Module, images: Tensor, **options: Any) -> Any:
    plan = trace(model, (torch.zeros(1, 1, 4, 4), torch.zeros(1, dtype=torch.long)))
    return score(model, [images], plan, max_samples=16, progress=False, **options)


def compensated(model: nn.Module, images: Tensor) -> Any:
    return compensate(OfBlackAndWhite(), model, [images], kept={}, progress=False)


def trained(model: nn.Module, images: Tensor) -> Any:
    return finetune(model, [images], steps=1, guard=False, progress=False)


@pytest.mark.parametrize("use", [scored, compensated, trained, diffusion_loss], ids=lambda f: f.__name__)
def test_images_from_0_to_1_are_refused_by_whatever_uses_the_model(use: Callable[..., Any]) -> None:
    model = OfBlackAndWhite()
    with pytest.raises(ValueError, match=r"go from 0 to 1, and the model's loss .* give images in \[-1, 1\]"):
        use(model, black_and_white())
    use(model, 2 * black_and_white() - 1)


def test_whoever_knows_better_gives_the_loss() -> None:
    model = OfBlackAndWhite()
    found = scored(model, black_and_white(), scheduler=SCHEDULER, loss_fn=make_objective(model, SCHEDULER).loss)
    assert found.samples >= 16


def test_bright_images_that_the_model_knows_are_taken() -> None:
    """White ones are in the range of both: as they are the model has the lower loss."""
    check_range_by_loss(OfBlackAndWhite(), make_objective(OfBlackAndWhite()), torch.ones(8, 1, 4, 4))


def test_what_the_loss_does_not_tell_is_said_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    image_range._say.cache_clear()
    with caplog.at_level(logging.WARNING, logger=image_range.__name__):
        for _ in range(2):
            check_range_by_loss(unet, make_objective(unet), torch.rand(8, 1, 8, 8))
        check_range_by_loss(unet, make_objective(unet), torch.rand(8, 1, 8, 8) - 0.5)
        check_range_by_loss(unet, make_objective(unet), torch.rand(2, 1, 8, 8))
    assert len(caplog.records) <= 2
    assert "no value below 0" in caplog.text
