"""Pruned models in diffusers' training scripts: moving averages, checkpoints to resume from, ``from_config``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
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


class Script:
    """What train_unconditional.py does with model, average and accelerator, with the two lines of deploy.md."""

    def __init__(self, pruned: Path) -> None:
        self.accelerator = Accelerator(cpu=True)
        model = dpf.from_pretrained(pruned)
        cls = PrunedClass(model)
        self.average = EMAModel(model.parameters(), model_cls=cls, model_config=model.config, use_ema_warmup=True)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

        def save_model_hook(models: Any, weights: Any, output_dir: str) -> None:
            self.average.save_pretrained(str(Path(output_dir, "unet_ema")))
            for each in models:
                each.save_pretrained(str(Path(output_dir, "unet")))
                weights.pop()

        def load_model_hook(models: Any, input_dir: str) -> None:
            self.average.load_state_dict(EMAModel.from_pretrained(str(Path(input_dir, "unet_ema")), cls).state_dict())
            for _ in range(len(models)):
                each, loaded = models.pop(), cls.from_pretrained(input_dir, subfolder="unet")
                each.register_to_config(**loaded.config)
                each.load_state_dict(loaded.state_dict())

        self.accelerator.register_save_state_pre_hook(save_model_hook)
        self.accelerator.register_load_state_pre_hook(load_model_hook)

    def train(self, steps: range) -> None:
        self.model.train()
        for step in steps:
            x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(step))
            self.accelerator.backward(self.model(x, 5).sample.square().mean())
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.average.step(self.model.parameters())


@pytest.mark.parametrize("asked", [{"like": LIKE}, {"ratio": 0.3}], ids=["plain", "free"])
def test_a_script_that_was_broken_off_ends_with_the_same_weights(asked: Any, tmp_path: Path) -> None:
    pruned(**asked).save_pretrained(tmp_path / "pruned")
    whole = Script(tmp_path / "pruned")
    whole.train(range(2))
    whole.accelerator.save_state(str(tmp_path / "checkpoint-2"))
    whole.train(range(2, 4))

    resumed = Script(tmp_path / "pruned")
    resumed.accelerator.load_state(str(tmp_path / "checkpoint-2"))
    resumed.train(range(2, 4))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters()):
        torch.testing.assert_close(a, b)
    for a, b in zip(whole.average.shadow_params, resumed.average.shadow_params):
        torch.testing.assert_close(a, b)


def test_the_pipeline_that_a_script_ends_with_is_loaded_again(tmp_path: Path) -> None:
    model = pruned(ratio=0.3)
    DDPMPipeline(unet=model, scheduler=DDPMScheduler()).save_pretrained(tmp_path)
    torch.testing.assert_close(run(dpf.pipeline_from_pretrained(tmp_path).unet), run(model))
