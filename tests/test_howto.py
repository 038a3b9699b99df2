"""The code of docs/howto.md runs, with small models in place of the reader's."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from tiny_pipelines import stable_diffusion
from torch import Tensor, nn

import diffprune_fast

PAGE = Path(__file__).parents[1] / "docs" / "howto.md"
SECTIONS = re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
BLOCKS = {title: re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL) for title, text in SECTIONS}


def small_unet(channels: int, size: int) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        size, channels, channels, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip


def images(n: int, channels: int = 3, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(n, channels, size, size, generator=generator) / 2).clamp(-1, 1)


def readers() -> dict[str, Any]:
    """The names that the page says are the reader's."""
    torch.manual_seed(0)
    classifier = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 4)
    )
    labels = torch.arange(16) % 4
    pipe = stable_diffusion()
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return {
        "unet": small_unet(3, 16), "scheduler": DDPMScheduler(), "images": images(64, size=16), "steps": 2,
        "pipe": pipe, "captioned": [(images(4, size=size), ["a red cat", "a house", "", "a tree"])] * 2,
        "latent_unet": small_unet(4, 8), "latents": [images(16, 4)],
        "model": classifier, "batches": [(images(16), labels)],
        "loader": [images(16, size=16)],
    }  # fmt: skip


@pytest.mark.parametrize("title", [title for title, blocks in BLOCKS.items() if blocks])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_sections_code_runs(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    few = functools.partial(diffprune_fast.score_and_prune, max_samples=16, progress=False)
    monkeypatch.setattr(diffprune_fast, "score_and_prune", few)
    names: dict[str, Any] = {**readers(), "torch": torch}
    for block in BLOCKS[title]:
        exec(compile(block, f"{PAGE.name}, {title}", "exec"), names)
    result = names["result"]
    assert result.after.macs < 0.61 * result.before.macs
