"""Sampling, held-out loss, SSIM and timing, against models whose answers are known."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import Tensor, nn

from diffprune_fast import evaluation
from diffprune_fast.evaluation import timing
from diffprune_fast.evaluation.complexity import complexity
from diffprune_fast.evaluation.loss import diffusion_loss
from diffprune_fast.evaluation.sampling import sample
from diffprune_fast.evaluation.similarity import ssim
from diffprune_fast.evaluation.timing import seconds_per_image

SHAPE = (6, 1, 8, 8)


class KnowsTheImages(nn.Module):
    """Answers with exactly the noise (or velocity) that leads to ``images``."""

    def __init__(self, images: Tensor, scheduler) -> None:
        super().__init__()
        self.register_buffer("images", images)
        self.scale = nn.Parameter(torch.ones(()))
        self.alphas = getattr(scheduler, "alphas_cumprod", None)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        clean = self.images[: len(sample)]
        if self.alphas is None:
            return self.scale * (sample - clean) / (timestep / 1000).view(-1, 1, 1, 1)
        signal = self.alphas[timestep].view(-1, 1, 1, 1)
        return self.scale * (sample - signal.sqrt() * clean) / (1 - signal).sqrt()


class AnswersZero(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample * self.anchor


def images(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def noise(seed: int = 1, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny_unet(**config) -> UNet2DModel:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4, **blocks, **config
    )


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), FlowMatchEulerDiscreteScheduler()], ids=["ddim", "flow"])
def test_a_model_that_knows_the_noise_is_sampled_back_to_its_images(scheduler):
    made = sample(KnowsTheImages(images(), scheduler), scheduler, noise(), steps=20)
    torch.testing.assert_close(made, images(), atol=2e-2, rtol=0)


def test_the_same_noise_gives_the_same_images_in_any_batch_size():
    model, scheduler = tiny_unet(), DDPMScheduler()
    whole = sample(model, scheduler, noise(), steps=4)
    assert torch.equal(whole, sample(model, scheduler, noise(), steps=4))
    torch.testing.assert_close(whole, sample(model, scheduler, noise(), steps=4, batch_size=4), atol=1e-5, rtol=0)


def test_labels_are_split_with_the_noise():
    model, scheduler = tiny_unet(num_class_embeds=10), DDPMScheduler()
    labels = torch.arange(len(noise()))
    whole = sample(model, scheduler, noise(), steps=3, labels=labels)
    parts = sample(model, scheduler, noise(), steps=3, labels=labels, batch_size=4)
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=0)
    assert not torch.allclose(whole, sample(model, scheduler, noise(), steps=3, labels=labels.flip(0)))


def test_sampling_and_loss_leave_every_modules_mode_and_the_random_state():
    model = tiny_unet()
    model.train()
    model.conv_in.eval()
    state = torch.get_rng_state()
    sample(model, DDPMScheduler(), noise(), steps=2)
    diffusion_loss(model, images(), passes=1)
    assert model.training
    assert not model.conv_in.training
    assert torch.equal(torch.get_rng_state(), state)


def test_sampling_does_not_move_the_callers_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler()
    before = scheduler.timesteps.clone()
    sample(AnswersZero(), scheduler, noise(), steps=3)
    assert torch.equal(scheduler.timesteps, before)


@pytest.mark.parametrize(
    ("arguments", "message"), [({"steps": 0}, "steps is 0"), ({"batch_size": 0}, "batch_size is 0")]
)
def test_sampling_refuses_what_makes_no_image(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(AnswersZero(), DDPMScheduler(), noise(), **arguments)


def test_sampling_names_a_model_that_makes_nan():
    model = AnswersZero()
    nn.init.constant_(model.anchor, float("nan"))
    with pytest.raises(FloatingPointError, match="AnswersZero made NaN"):
        sample(model, DDPMScheduler(), noise(), steps=2)


def test_loss_is_zero_for_the_true_noise_and_the_noises_power_for_none():
    scheduler = DDPMScheduler()
    many = images(shape=(64, 1, 8, 8))
    assert diffusion_loss(KnowsTheImages(many, scheduler), many, scheduler, batch_size=64) < 1e-6
    assert diffusion_loss(AnswersZero(), many, scheduler) == pytest.approx(1.0, abs=0.05)


def test_loss_depends_on_the_seed_alone():
    model, scheduler = tiny_unet(), DDPMScheduler()
    first = diffusion_loss(model, images(), scheduler, seed=3)
    assert diffusion_loss(model, images(), scheduler, seed=3) == first
    assert diffusion_loss(model, images(), scheduler, seed=3, batch_size=4) == pytest.approx(first, rel=1e-5)
    assert diffusion_loss(model, images(), scheduler, seed=4) != first


def test_loss_takes_what_a_loader_yields():
    model, scheduler = tiny_unet(num_class_embeds=10), DDPMScheduler()
    labels = torch.arange(len(images()))
    pair = diffusion_loss(model, (images(), labels), scheduler)
    assert pair == diffusion_loss(model, {"images": images(), "class_labels": labels}, scheduler)
    assert pair != diffusion_loss(model, (images(), labels.flip(0)), scheduler)


def test_loss_uses_timesteps_from_every_part_of_the_schedule():
    seen = []

    def loss_fn(model: nn.Module, batch: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        seen.append(t)
        return torch.zeros(len(batch))

    diffusion_loss(AnswersZero(), images(shape=(50, 1, 8, 8)), DDPMScheduler(), passes=2, loss_fn=loss_fn)
    strips = torch.cat(seen).reshape(2, 50).sort(dim=1).values // 20
    assert torch.equal(strips, torch.arange(50).expand(2, 50))


def test_loss_refuses_no_images_and_names_nan():
    with pytest.raises(ValueError, match="0 images"):
        diffusion_loss(AnswersZero(), images()[:0], DDPMScheduler())
    model = AnswersZero()
    nn.init.constant_(model.anchor, float("nan"))
    with pytest.raises(FloatingPointError, match="AnswersZero"):
        diffusion_loss(model, images(), DDPMScheduler())


def test_ssim_of_constant_images_is_its_luminance_term():
    a, b = 0.6, 0.85
    first, second = torch.full((2, 1, 16, 16), 2 * a - 1), torch.full((2, 1, 16, 16), 2 * b - 1)
    c1 = 0.01**2
    assert ssim(first, second) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-4)


def test_ssim_falls_from_one_with_the_disturbance():
    shape = (4, 3, 16, 16)
    clean = images(shape=shape)
    little, much = (clean + s * noise(shape=shape) for s in (0.1, 0.6))
    assert ssim(clean, clean) == pytest.approx(1.0, abs=1e-6)
    assert 1.0 > ssim(little, clean) > ssim(much, clean) > ssim(-clean, clean)


def test_ssim_refuses_images_that_cannot_be_compared():
    with pytest.raises(ValueError, match="same noise"):
        ssim(torch.zeros(2, 1, 16, 16), torch.zeros(3, 1, 16, 16))
    with pytest.raises(ValueError, match="at least 11"):
        ssim(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8))


def test_seconds_per_image_is_the_median_of_the_repeats(monkeypatch):
    clock = iter([0.0, 6.0, 10.0, 22.0, 30.0, 33.0])
    monkeypatch.setattr(timing, "_now", lambda device: next(clock))
    assert seconds_per_image(AnswersZero(), DDPMScheduler(), noise(), steps=2, repeats=3) == 6.0 / len(noise())
    with pytest.raises(ValueError, match="repeats is 0"):
        seconds_per_image(AnswersZero(), DDPMScheduler(), noise(), repeats=0)


def test_complexity_counts_every_parameter_and_the_convolutions_work():
    model = tiny_unet()
    found = complexity(model)
    assert found.params == sum(p.numel() for p in model.parameters())
    # conv_in and conv_out alone: 9 taps, 8 channels, 64 positions each.
    assert found.macs > 2 * 9 * 8 * 64


def test_every_public_name_is_there():
    assert all(callable(getattr(evaluation, name)) for name in evaluation.__all__)
