"""A training that makes the model worse leaves the weights of before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from diffprune_fast.recovery.finetune import Finetuned, finetune


class Denoiser(nn.Module):
    """With a buffer that training changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(sample))))


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(16, 1, 8, 8, generator=generator) - 0.5 for _ in range(3)]


def run(model: nn.Module, loader: Any = None, **options: Any) -> Finetuned:
    given = {"steps": 3, "lr": 1e-2, "progress": False, **options}
    return finetune(model, batches() if loader is None else loader, DDPMScheduler(), **given)


def nearly(teacher: nn.Module) -> nn.Module:
    """All but the teacher itself: every step of Adam's, as long as the rate, leads away from it."""
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 1e-5)
    return model


@pytest.mark.parametrize("training", [True, False])
def test_a_model_that_a_few_steps_make_worse_is_put_back_bit_for_bit(training: bool) -> None:
    teacher = Denoiser()
    model = nearly(teacher).train(training)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    done = run(model, teacher=teacher)
    assert not done.helped
    assert done.after is not None
    assert done.before is not None
    assert done.after > 10 * done.before
    assert len(done.losses) == 3
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]), name
    assert model.training is training


def test_without_the_guard_the_weights_are_those_that_it_ended_with() -> None:
    teacher = Denoiser()
    model = nearly(teacher)
    was = model.first.weight.detach().clone()
    done = run(model, teacher=teacher, guard=False)
    assert (done.before, done.after, done.helped) == (None, None, True)
    assert not torch.equal(model.first.weight, was)


def test_a_training_that_helps_is_kept() -> None:
    model, other = Denoiser(), Denoiser()
    with torch.no_grad():
        other.last.weight.mul_(3)
    was = model.last.weight.detach().clone()
    done = run(model, teacher=other, steps=20)
    assert done.helped
    assert done.after < done.before  # type: ignore[operator]
    assert not torch.equal(model.last.weight, was)


def test_the_order_of_the_training_is_the_same_with_and_without() -> None:
    with_it, without = Denoiser(), Denoiser()
    loader = torch.utils.data.DataLoader(torch.cat(batches()), batch_size=16, shuffle=True)
    assert run(with_it, loader).losses == pytest.approx(run(without, loader, guard=False).losses, rel=1e-5)


def test_of_a_loader_that_can_be_walked_once_nothing_is_taken() -> None:
    done = run(Denoiser(), iter(batches()))
    assert (len(done.losses), done.before) == (3, None)
