"""The method estimates the damage where its budget is shared by it, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

import diffprune_fast as dpf

QUICK: dict[str, Any] = {"max_samples": 8, "micro_batch": 4, "progress": False}


def tiny_unet() -> UNet2DModel:
    torch.manual_seed(0)
    types = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return UNet2DModel(8, 3, 3, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, **types)


@pytest.mark.parametrize(
    ("options", "used"),
    [
        ({"macs": 0.5}, "gauss-newton"),
        ({"macs": 0.5, "criterion": "random"}, "gauss-newton"),
        ({"macs": 0.5, "allocation": "mean"}, "mean"),
        ({"ratio": 0.3}, "uniform"),
    ],
)
def test_damage_is_there_where_it_is_used(options: dict[str, Any], used: str) -> None:
    result = dpf.score_and_prune(tiny_unet(), [torch.rand(8, 3, 8, 8)], **QUICK, **options)
    assert result.selection.allocation == used
    assert (result.scores.damage is not None) == (used == "gauss-newton")


def test_without_images_groups_share_by_their_means() -> None:
    result = dpf.score_and_prune(tiny_unet(), None, criterion="magnitude", macs=0.5)
    assert result.selection.allocation == "mean"
    assert result.scores.damage is None
