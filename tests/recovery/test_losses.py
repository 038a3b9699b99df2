"""The recovery losses: planted cases whose value is known, and training by each name."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from diffprune_fast import finetune, from_pretrained, score_and_prune
from diffprune_fast.objective.loss import make_objective
from diffprune_fast.recovery.features import FeatureDistillation, relative_distance, shared_layers
from diffprune_fast.recovery.losses import step_loss_of
from diffprune_fast.recovery.second_order import SecondOrder


def unet(block_out_channels: tuple[int, int] = (8, 16)) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        8,
        in_channels=1,
        out_channels=1,
        block_out_channels=block_out_channels,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=8,
    )


@pytest.fixture(scope="module")
def pruned() -> tuple[nn.Module, nn.Module]:
    """A small UNet sliced and nothing else, and the dense one."""
    dense = unet().eval()
    options = {"criterion": "magnitude", "ratio": 0.3, "round_to": 4, "inplace": False, "compensate": False}
    return score_and_prune(dense, None, rotate=False, **options).model.eval(), dense


def step(seed: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images, noise = (torch.randn(8, 1, 8, 8, generator=generator) for _ in range(2))
    return images, torch.arange(8) * 100, noise


def test_features_are_compared_over_the_kept_channels_relative_to_the_teachers():
    theirs = torch.tensor([[1.0, -1.0, 3.0, 2.0]]).expand(6, 4)
    kept = torch.tensor([0, 1])
    ours = torch.tensor([[1.5, -1.0]]).expand(6, 2)
    assert float(relative_distance(ours, theirs, kept, -1)) == pytest.approx(0.25 / 2)
    assert float(relative_distance(100 * ours, 100 * theirs, kept, -1)) == pytest.approx(0.25 / 2)
    assert float(relative_distance(theirs, theirs, None, -1)) == 0


def test_outliers_of_the_teacher_are_left_out():
    theirs = torch.ones(1, 100)
    theirs[0, ::2] = -1
    ours = theirs + 0.1
    theirs[0, 7], ours[0, 7] = 500.0, -500.0
    assert float(relative_distance(ours, theirs, None, -1)) == pytest.approx(0.01, rel=1e-4)


def test_what_slicing_left_alone_has_no_distance_and_its_channels_are_the_kept_ones(pruned):
    model, dense = pruned
    layers = shared_layers(model, dense, most=99)
    kept = layers["conv_in"]
    assert torch.equal(model.conv_in.weight, dense.conv_in.weight[kept])
    assert layers["conv_out"] is None
    assert not [name for name in layers if name.endswith(("to_q", "to_k", "to_v"))]
    objective = make_objective(model, DDPMScheduler())
    first = FeatureDistillation(dense, objective, layers={"conv_in": kept}, weight=1.0)
    plain = FeatureDistillation(dense, objective, layers={"conv_in": kept}, weight=0.0)
    torch.testing.assert_close(first(model, *step()), plain(model, *step()))
    wrong = FeatureDistillation(dense, objective, layers={"conv_in": kept.roll(1)}, weight=1.0)
    assert wrong(model, *step()) > 2 * plain(model, *step())


def test_at_most_so_many_layers_are_compared_from_first_to_last(pruned):
    every, some = (shared_layers(*pruned, most=most) for most in (99, 5))
    assert len(some) == 5
    first, *_, last = every
    assert first in some
    assert last in some


def test_a_model_that_was_loaded_still_knows_its_channels(pruned, tmp_path):
    model, dense = pruned
    model.save_pretrained(tmp_path)
    loaded = shared_layers(from_pretrained(tmp_path), dense)
    for name, kept in shared_layers(model, dense).items():
        assert (kept is None) == (loaded[name] is None)
        assert kept is None or torch.equal(kept, loaded[name])


def test_features_of_a_model_of_other_origin_are_refused(pruned):
    with pytest.raises(ValueError, match="no record of a pruning"):
        shared_layers(unet(), pruned[1])
    with pytest.raises(ValueError, match="wasn't pruned from the teacher"):
        shared_layers(pruned[0], unet(block_out_channels=(8, 8)))


class Linear(nn.Module):
    """y = A x: its sensitivity along v is ||A v||^2, everywhere and at any distance."""

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(a)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return (sample.flatten(1) @ self.a.T).view_as(sample)


def test_sensitivities_of_linear_models_are_exact():
    ours, theirs = Linear(2 * torch.eye(64).double()), Linear(3 * torch.eye(64).double())
    objective = make_objective(ours, DDPMScheduler())
    images, t, noise = step()
    both = SecondOrder(theirs, objective, weight=1.0)(ours, images.double(), t, noise.double())
    answers = SecondOrder(theirs, objective, weight=0.0)(ours, images.double(), t, noise.double())
    assert (both - answers).item() == pytest.approx((2**2 / 3**2 - 1) ** 2, rel=1e-6)


def test_differences_give_the_gradient_that_derivatives_give():
    """Against torch.func's Jacobian product, for a network that bends."""

    class Bent(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 64)).double()

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.layers(sample.flatten(1)).view_as(sample)

    ours, theirs = Bent(0), Bent(1)
    objective = make_objective(ours, DDPMScheduler())
    images, t, noise = (x.double() if x.is_floating_point() else x for x in step())
    torch.manual_seed(3)
    loss = SecondOrder(theirs, objective, weight=1.0, length=1e-6)(ours, images, t, noise)
    (loss - SecondOrder(theirs, objective, weight=0.0)(ours, images, t, noise)).backward()
    found = ours.layers[0].weight.grad.clone()
    ours.zero_grad()
    torch.manual_seed(3)
    x = objective.noisy(images, t, noise)
    v = torch.randn(x.shape).double().flatten(1)
    v = (v / v.norm(dim=1, keepdim=True)).view_as(x)
    energies = [
        torch.func.jvp(lambda x, m=m: m(x, t), (x,), (v,))[1].flatten(1).square().sum(1) for m in (ours, theirs)
    ]
    exact = (energies[0] / energies[1].detach() - 1).square().mean()
    exact.backward()
    torch.testing.assert_close(found, ours.layers[0].weight.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("loss", ["distillation", "features", "second-order"])
def test_every_loss_brings_the_model_closer_to_its_teacher(pruned, loss):
    model, dense = copy.deepcopy(pruned[0]), pruned[1]
    images, t, noise = step(5)
    noisy = make_objective(model, DDPMScheduler()).noisy(images, t, noise)

    def distance() -> float:
        with torch.no_grad():
            return float((model(noisy, t).sample - dense(noisy, t).sample).square().mean())

    before = distance()
    batches = [step(seed)[0] for seed in range(10, 14)]
    finetune(model, batches, DDPMScheduler(), steps=40, lr=2e-3, teacher=dense, loss=loss, progress=False)
    assert distance() < 0.7 * before


class Transformer(nn.Module):
    """A class of one's own, as DiT is: how it is called, the first batch says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.classes = nn.Conv2d(1, 16, 2, 2), nn.Embedding(4, 16)
        self.modulation = nn.Linear(16, 32)
        self.norm = nn.LayerNorm(16, elementwise_affine=False)
        self.up, self.down, self.last = nn.Linear(16, 48), nn.Linear(48, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        about = self.classes(y) + torch.cos(t[:, None] / 1000 * torch.arange(1, 17))
        shift, scale = self.modulation(nn.functional.silu(about))[:, None].chunk(2, -1)
        h = h + self.down(nn.functional.gelu(self.up(self.norm(h) * (1 + scale) + shift)))
        return nn.functional.pixel_shuffle(self.last(h).transpose(1, 2).unflatten(2, (4, 4)), 2)


def test_features_of_a_class_of_ones_own_are_learnt_at_what_the_first_batch_calls_it_with():
    dense = Transformer().eval()
    labels = torch.arange(8) % 4
    batches = [{"x": step(seed)[0], "y": labels} for seed in range(10, 14)]
    options = {"criterion": "magnitude", "ratio": 0.5, "round_to": 4, "inplace": False, "compensate": False}
    model = score_and_prune(dense, batches, rotate=False, damage=False, **options).model
    assert model.up.out_features < 48
    example = {"x": torch.empty(1, 1, 8, 8), "t": torch.tensor([500]), "y": labels[:1]}
    compared = step_loss_of("features", model, dense, make_objective(model, DDPMScheduler()), 1.0, None, example)
    images, t, noise = step(5)

    def loss() -> float:
        with torch.no_grad():
            return float(compared(model, {"x": images, "y": labels}, t, noise))

    before = loss()
    finetune(model, batches, DDPMScheduler(), steps=40, lr=2e-3, teacher=dense, loss="features", progress=False)
    assert loss() < 0.7 * before


def test_the_mix_is_seven_tenths_of_the_teacher(pruned):
    model, dense = pruned
    objective = make_objective(model, DDPMScheduler())
    of = {name: step_loss_of(name, model, dense, objective, 1.0, None)(model, *step()) for name in ("mixed", None)}
    own = objective.loss(model, *step())
    torch.testing.assert_close(of["mixed"], 0.7 * of[None] + 0.3 * own)


@pytest.mark.parametrize(
    ("loss", "teacher", "message"),
    [
        ("features", None, "needs a teacher"),
        ("noise", "dense", "asks no teacher: leave it out"),
        ("guess", "dense", "choose one of 'noise', 'distillation'"),
    ],
)
def test_losses_that_do_not_fit_are_refused(pruned, loss, teacher, message):
    with pytest.raises(ValueError, match=message):
        finetune(unet(), [step()[0]], steps=1, loss=loss, teacher=pruned[1] if teacher else None, progress=False)


def test_a_callable_is_the_loss():
    model = unet()
    before = np.asarray(model.conv_out.bias.detach().numpy()).copy()

    def loss(model: nn.Module, batch: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return model.conv_out.bias.square().sum()

    finetune(model, [step()[0]], steps=20, lr=1e-2, warmup=0, ema=0.0, loss=loss, progress=False)
    assert np.abs(model.conv_out.bias.detach().numpy()).max() < np.abs(before).max()
