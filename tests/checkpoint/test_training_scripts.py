"""Pruned models in diffusers' training scripts: moving averages, checkpoints to resume from, ``from_config``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from models import small_unet
from torch import Tensor

import diffprune_fast as dpf
from diffprune_fast.checkpoint import PrunedClass

LIKE = {"block_out_channels": (16, 48, 48)}


def pruned(**asked: Any) -> UNet2DModel:
    torch.manual_seed(0)
    model = small_unet()
    dpf.score_and_prune(model, None, criterion="magnitude", **asked)
    return model


def stepped(model: UNet2DModel, average: EMAModel) -> None:
    """One step of training, and of the average."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.ones(1, 3, 16, 16), 5).sample.square().mean().backward()
    optimizer.step()
    average.step(model.parameters())


def run(model: UNet2DModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.linspace(-1, 1, 768).reshape(1, 3, 16, 16), 7).sample


@pytest.mark.parametrize(
    ("asked", "make"),
    [
        ({"like": LIKE}, lambda model: UNet2DModel),
        ({"like": LIKE}, PrunedClass),
        ({"ratio": 0.3}, PrunedClass),
    ],
)
def test_a_moving_average_is_saved_and_loaded(asked: Any, make: Any, tmp_path: Path) -> None:
    model = pruned(**asked)
    cls = make(model)
    average = EMAModel(model.parameters(), decay=0.75, model_cls=cls, model_config=model.config)
    stepped(model, average)
    stepped(model, average)
    average.save_pretrained(tmp_path)
    again = EMAModel.from_pretrained(tmp_path, cls)
    assert (again.decay, again.optimization_step) == (0.75, 2)
    assert len(again.shadow_params) == len(average.shadow_params)
    assert all(torch.equal(a, b) for a, b in zip(again.shadow_params, average.shadow_params))
    assert not torch.equal(again.shadow_params[0], next(model.parameters()))


def test_a_class_that_would_build_other_widths_fails_before_anything_is_written(tmp_path: Path) -> None:
    model = pruned(ratio=0.3)
    average = EMAModel(model.parameters(), model_cls=UNet2DModel, model_config=model.config)
    with pytest.raises(RuntimeError, match="must match the size"):
        average.save_pretrained(tmp_path / "ema")
    assert not (tmp_path / "ema").exists()


@pytest.mark.parametrize(("asked", "plain"), [({"like": LIKE}, True), ({"ratio": 0.3}, False)])
def test_training_resumes_from_a_checkpoint_as_the_scripts_do_it(asked: Any, plain: bool, tmp_path: Path) -> None:
    """The hooks of diffusers' train_unconditional.py, for --resume_from_checkpoint."""
    model = pruned(**asked)
    cls: Any = UNet2DModel if plain else PrunedClass(model)
    model.save_pretrained(tmp_path / "unet")  # save_model_hook
    want = run(model)
    stepped(model, EMAModel(model.parameters()))
    loaded = cls.from_pretrained(tmp_path, subfolder="unet")  # load_model_hook
    model.register_to_config(**loaded.config)
    model.load_state_dict(loaded.state_dict())
    torch.testing.assert_close(run(model), want)


def test_a_config_of_a_plain_result_builds_its_widths() -> None:
    model = pruned(like=LIKE)
    fresh = UNet2DModel.from_config(model.config)
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_the_class_of_any_other_gives_its_widths() -> None:
    model = pruned(ratio=0.3)
    fresh = PrunedClass(model).from_config(model.config)
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert fresh is not model
