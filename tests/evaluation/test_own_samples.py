"""Batches that a model makes itself: like a loader's, the same every time, and of the model as it was given."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn

from diffprune_fast import score, trace
from diffprune_fast.evaluation.own_samples import OwnSamples
from diffprune_fast.evaluation.sampling import sample

BLOCKS = {"layers_per_block": 1, "norm_num_groups": 4, "block_out_channels": (8,), "sample_size": 8}


def unet(**config) -> UNet2DModel:
    torch.manual_seed(0)
    ends = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return UNet2DModel(**{"in_channels": 1, "out_channels": 1, **BLOCKS, **ends, **config})


def dit() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, out_channels=8, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, num_embeds_ada_norm=6, norm_elementwise_affine=False,
    )  # fmt: skip


def own(model: nn.Module, scheduler=None, **arguments) -> OwnSamples:
    return OwnSamples(model, scheduler, **{"n": 6, "steps": 3, "batch": 4, "progress": False, **arguments})


class Counting(nn.Module):
    """Answers zero, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.calls = 0

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        self.calls += 1
        return sample * self.anchor


def test_batches_are_images_of_the_models_size_in_the_schedulers_range():
    batches = list(own(unet(), DDPMScheduler(clip_sample_range=0.5)))
    assert [tuple(b.shape) for b in batches] == [(4, 1, 8, 8), (2, 1, 8, 8)]
    assert all(b.dtype == torch.float32 and not b.requires_grad for b in batches)
    assert max(float(b.abs().amax()) for b in batches) <= 0.5


@pytest.mark.parametrize(
    "scheduler",
    [DDPMScheduler(clip_sample=False), DDIMScheduler(clip_sample=False), FlowMatchEulerDiscreteScheduler()],
    ids=["ddpm", "ddim", "flow"],
)
def test_where_the_scheduler_does_not_clip_images_have_no_bounds(scheduler):
    assert float(next(iter(own(Counting(), scheduler, shape=(1, 8, 8)))).abs().amax()) > 1


def test_another_model_makes_other_images_of_the_same_seed():
    model, scheduler = unet(), DDPMScheduler()
    batch = next(iter(own(model, scheduler)))
    with torch.no_grad():
        model.conv_out.bias.add_(0.5)
    assert not torch.allclose(batch, next(iter(own(model, scheduler))))


def test_same_seed_same_samples_another_seed_others_whichever_is_drawn_first():
    model = unet()
    one, two, three = list(own(model)), own(model), list(own(model, seed=1))
    torch.testing.assert_close(two._get(1), one[1])
    torch.testing.assert_close(two._get(0), one[0])
    assert not torch.allclose(one[0], three[0])
    assert not torch.allclose(one[0][:2], one[1])


def test_nothing_is_made_before_it_is_asked_for_and_nothing_twice():
    model = Counting()
    loader = own(model, shape=(1, 8, 8))
    assert len(loader) == 2
    assert model.calls == 0
    iterator = iter(loader)
    next(iterator)
    assert model.calls == 3
    list(iterator), list(loader), loader.make_all()
    assert model.calls == 6


@pytest.mark.parametrize(("model", "classes"), [(unet(num_class_embeds=5), 5), (dit(), 6)], ids=["unet", "dit"])
def test_models_with_classes_get_labels_of_all_of_them(model, classes):
    images, labels = next(iter(own(model, n=64, batch=64, steps=1)))
    assert len(images) == len(labels) == 64
    assert labels.dtype == torch.long
    assert set(labels.tolist()) == set(range(classes))


def test_the_labels_are_what_the_model_was_told():
    model = unet(num_class_embeds=5)
    told = []
    handle = model.register_forward_pre_hook(
        lambda _, __, kwargs: told.append(kwargs["class_labels"]), with_kwargs=True
    )
    _, labels = next(iter(own(model)))
    handle.remove()
    assert all(torch.equal(t, labels) for t in told)


def test_the_second_half_of_an_answer_is_a_variance_and_no_image():
    model, scheduler = dit(), DDIMScheduler()
    made = sample(model, scheduler, torch.zeros(2, 4, 4, 4), steps=2, labels=torch.tensor([0, 1]))
    assert made.shape == (2, 4, 4, 4)


def test_the_model_and_the_global_random_state_are_as_before():
    model = unet().train()
    model.conv_out.eval()
    state = torch.get_rng_state()
    list(own(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.training, model.conv_in.training, model.conv_out.training) == (True, True, False)


def test_models_in_half_precision_make_images_in_single():
    assert next(iter(own(unet().to(torch.bfloat16)))).dtype == torch.float32


@pytest.mark.parametrize("config", [{}, {"num_class_embeds": 5}], ids=["images", "labels"])
def test_scores_can_be_computed_on_own_samples(config):
    model = unet(**config)
    loader = own(model, n=16, batch=8)
    scores = score(model, loader, trace(model), criterion="taylor", micro_batch=4, max_samples=16, progress=False)
    assert scores.samples == 16
    assert (scores.values > 0).any()


def test_a_model_that_was_pruned_since_makes_no_more_batches():
    model = unet()
    loader = own(model)
    first = next(iter(loader))
    model.conv_in.weight = nn.Parameter(model.conv_in.weight.detach()[:4])
    assert next(iter(loader)) is first
    with pytest.raises(ValueError, match="UNet2DModel was pruned since"):
        list(loader)


def test_the_time_is_estimated_from_a_few_steps_and_said_beforehand(capsys, monkeypatch):
    model = Counting()
    loader = own(model, shape=(1, 8, 8), n=40, batch=4, steps=25)
    seconds = iter([2.0, 3.0])
    monkeypatch.setattr(loader, "_seconds", lambda size, steps: next(seconds))
    assert loader.estimate() == pytest.approx(10 * (2 + 23 * 0.5))
    assert model.calls == 2
    spoken = own(model, shape=(1, 8, 8), progress=True)
    next(iter(spoken))
    assert "sampling 6 images takes about" in capsys.readouterr().err


def text_unet() -> UNet2DConditionModel:
    ends = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    return UNet2DConditionModel(**BLOCKS, **ends, cross_attention_dim=8, attention_head_dim=2)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (text_unet, {}, "needs 'encoder_hidden_states'.*Give the pipeline and prompts"),
        (lambda: unet(class_embed_type="timestep"), {}, "doesn't say how many there are"),
        (lambda: unet(sample_size=None), {}, "doesn't say how large its images are"),
        (lambda: AutoencoderKL(block_out_channels=(8,), norm_num_groups=4), {}, "is an autoencoder"),
        (Counting, {}, "doesn't say how large its images are"),
        (unet, {"n": 0}, "n is 0"),
        (unet, {"batch": 0}, "batch is 0"),
        (unet, {"steps": 0}, "steps is 0"),
    ],
)
def test_what_cannot_be_sampled_is_refused_with_the_way_out(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        own(model(), **arguments)
