"""Finetuning: it learns, it touches only what it may, it stops at the first sign of trouble."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from diffprune_fast.recovery.finetune import finetune


class Denoiser(nn.Module):
    """Two convolutions and a dropout: enough to learn that the noise is most of a noisy image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.dropout = nn.Dropout(0.1)
        self.last = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.last(self.dropout(torch.relu(self.first(sample))))


def batches(n: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(16, 1, 8, 8, generator=generator) * 0.2 for _ in range(n)]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def run(model: nn.Module, **arguments):
    return finetune(model, batches(), DDPMScheduler(), **{"steps": 5, "lr": 1e-2, "progress": False, **arguments})


def test_the_loss_falls_and_every_step_is_in_the_log():
    done = run(Denoiser(), steps=60)
    assert len(done.losses) == 60
    assert sum(done.losses[-10:]) < 0.5 * sum(done.losses[:10])


def test_same_seed_same_weights_another_seed_others():
    models = [Denoiser() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1)):
        run(model, seed=seed)
    first, second, third = (model.first.weight for model in models)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_frozen_parameters_modes_random_state_and_gradients_are_as_before():
    model = Denoiser()
    model.first.weight.requires_grad_(False)
    model.train()
    model.last.eval()
    before, state = weights(model), torch.get_rng_state()
    run(model)
    assert torch.equal(model.first.weight, before["first.weight"])
    assert not model.first.weight.requires_grad
    assert not torch.equal(model.last.weight, before["last.weight"])
    assert (model.training, model.last.training) == (True, False)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_the_model_ends_with_the_average_of_its_weights():
    averaged, last = Denoiser(), Denoiser()
    start = averaged.last.weight.detach().clone()
    run(averaged, ema=0.9999, schedule="constant")
    run(last, ema=0.0, schedule="constant")
    moved_averaged, moved_last = ((m.last.weight - start).norm() for m in (averaged, last))
    assert 0 < moved_averaged < moved_last


def test_warmup_starts_from_nothing():
    model = Denoiser()
    before = weights(model)
    run(model, steps=1, warmup=1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_nan_weight_is_named_before_anything_is_changed():
    model = Denoiser()
    with torch.no_grad():
        model.last.bias.fill_(float("nan"))
    before = weights(model)
    with pytest.raises(FloatingPointError, match="step 0: look for NaN"):
        run(model)
    assert torch.equal(model.first.weight, before["first.weight"])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"steps": 0}, "steps is 0"), ({"steps": -3}, "steps is -3"), ({"schedule": "wobble"}, "wobble")],
)
def test_settings_that_cannot_train_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        run(Denoiser(), **arguments)


def test_an_empty_or_spent_loader_is_named():
    with pytest.raises(ValueError, match="the loader is empty"):
        finetune(Denoiser(), [], DDPMScheduler(), steps=2, progress=False)
    with pytest.raises(ValueError, match="iterated only once"):
        finetune(Denoiser(), iter(batches(1)), DDPMScheduler(), steps=2, progress=False)


def test_a_model_with_nothing_to_train_is_named():
    model = Denoiser().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of Denoiser requires a gradient"):
        run(model)
