"""score_and_prune with rotation and compensation, its defaults: all of it or nothing of it."""

from __future__ import annotations

import copy
import sys
from functools import wraps
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor

import diffprune_fast as dpf
import diffprune_fast.stages
from diffprune_fast import compensation
from diffprune_fast.plain import wish

QUICK: dict[str, Any] = {"macs": 0.6, "round_to": 4, "max_samples": 32, "progress": False}


def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
    ).eval()


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(32, 3, 8, 8, generator=generator) * 2 - 1 for _ in range(6)]


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def assert_same_bits(model: torch.nn.Module, before: dict[str, Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], before[name]) for name in before)


def test_the_result_tells_the_three_losses_and_what_was_rotated() -> None:
    result = dpf.score_and_prune(unet(), images(), inplace=False, **QUICK)
    found, rotation = result.compensation, result.rotation
    assert found is not None
    assert rotation is not None
    assert found.layers
    assert rotation.rotated
    assert (found.compensated < found.sliced) == found.helped
    text = str(result)
    assert f"compensated {found.compensated:.4g}" in text
    assert "rotated" in text
    assert {"rotate", "score", "compensate", "slice"} <= result.seconds.keys()


def test_in_place_gives_what_a_copy_gets() -> None:
    model = unet()
    held = dict(model.named_parameters())
    apart = dpf.score_and_prune(unet(), images(), inplace=False, **QUICK)
    within = dpf.score_and_prune(model, images(), **QUICK)
    assert within.model is model
    assert all(p is held[name] for name, p in model.named_parameters())
    for name, want in apart.model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], want, rtol=1e-4, atol=1e-5)


def test_a_copy_leaves_the_model_to_the_bit() -> None:
    model = unet()
    before = weights(model)
    dpf.score_and_prune(model, images(), inplace=False, **QUICK)
    assert_same_bits(model, before)


@pytest.mark.parametrize("stage", ["score", "select", "compensate"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_whatever_is_raised_leaves_the_model_to_the_bit(
    stage: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = unet()
    before = weights(model)

    owner = {"score": sys.modules["diffprune_fast.stages"], "select": wish, "compensate": compensation}[stage]
    real, calls = getattr(owner, stage), []

    @wraps(real)
    def fail(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if stage == "select" and len(calls) == 1:  # the rehearsal's
            return real(*args, **kwargs)
        raise error("in the middle")

    monkeypatch.setattr(owner, stage, fail)
    with pytest.raises(error, match="in the middle"):
        dpf.score_and_prune(model, images(), **QUICK)
    assert_same_bits(model, before)


def test_compensation_and_rotation_can_be_left_out() -> None:
    result = dpf.score_and_prune(unet(), images(), rotate=False, compensate=False, **QUICK)
    assert result.compensation is None
    assert result.rotation is None


def test_an_optimizer_keeps_the_basis_that_its_state_is_of() -> None:
    model = unet()
    optimizer = torch.optim.Adam(model.parameters())
    result = dpf.score_and_prune(model, images(), optimizer=optimizer, **QUICK)
    assert result.rotation is None
    assert result.compensation is not None


def test_a_generator_serves_every_stage() -> None:
    batches = images()
    once = dpf.score_and_prune(unet(), iter(batches), inplace=False, **QUICK)
    again = dpf.score_and_prune(unet(), batches, inplace=False, **QUICK)
    assert all((once.keep[name] == again.keep[name]).all() for name in again.keep)
    assert once.compensation is not None
    assert again.compensation is not None
    assert once.compensation.samples == again.compensation.samples


def test_without_images_the_model_makes_them() -> None:
    model = unet()
    before = copy.deepcopy(model)
    result = dpf.score_and_prune(model, None, inplace=False, **QUICK)
    assert result.own_samples == 512
    assert result.compensation is not None
    assert "without data: from 512 images" in str(result)
    assert_same_bits(model, weights(before))


def test_criteria_without_data_stay_as_quick_as_they_are() -> None:
    result = dpf.score_and_prune(unet(), None, criterion="magnitude", macs=0.6, round_to=4)
    assert (result.own_samples, result.compensation, result.rotation) == (0, None, None)


def test_prompts_are_for_pipelines() -> None:
    with pytest.raises(ValueError, match="prompts are for pipelines"):
        dpf.score_and_prune(unet(), ["a cat"], **QUICK)
