"""Finetuning towards a teacher: it is asked exactly what the model was asked, and it is left as it was."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import Tensor, nn

from diffprune_fast.objective.loss import make_objective
from diffprune_fast.recovery.distillation import Distillation, recorded
from diffprune_fast.recovery.finetune import finetune


class Denoiser(nn.Module):
    """Told the time and, where it has classes, a label; with a dropout that evaluation turns off."""

    def __init__(self, seed: int = 0, classes: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.label = nn.Embedding(classes, 8) if classes else None
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Conv2d(8, 1, 3, padding=1)
        self.config = {"num_class_embeds": classes or None}

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        hidden = self.first(sample) + (timestep / 1000).to(sample.dtype).view(-1, 1, 1, 1)
        if self.label is not None:
            hidden = hidden + self.label(class_labels)[:, :, None, None]
        return self.last(self.dropout(torch.relu(hidden)))


def batches(n: int = 4, labels: bool = False, dtype: torch.dtype = torch.float32) -> list:
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(16, 1, 8, 8, generator=generator).to(dtype) * 0.2 for _ in range(n)]
    return [(x, torch.arange(16) % 3) for x in images] if labels else images


def run(model: nn.Module, teacher: object, loader: list | None = None, **arguments):
    given = {"steps": 5, "lr": 1e-2, "progress": False, "scheduler": DDPMScheduler(), **arguments}
    return finetune(model, batches() if loader is None else loader, teacher=teacher, **given)


def distance(model: nn.Module, teacher: nn.Module) -> float:
    """Between their answers to noise, in evaluation mode."""
    generator = torch.Generator().manual_seed(5)
    noisy, t = torch.randn(32, 1, 8, 8, generator=generator), torch.arange(32) * 30
    with torch.no_grad():
        return float((model.eval()(noisy, t) - teacher.eval()(noisy, t)).square().mean())


def test_a_student_that_is_as_its_teacher_has_no_loss_and_stays_as_it_is():
    teacher = Denoiser().double()
    model = copy.deepcopy(teacher)
    done = run(model, teacher, batches(dtype=torch.float64))
    assert max(done.losses) < 1e-20
    for p, q in zip(model.parameters(), teacher.parameters()):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


def test_the_model_comes_closer_to_its_teacher():
    teacher, model = Denoiser(), Denoiser(seed=1)
    before = distance(model, teacher)
    done = run(model, teacher, steps=80)
    assert len(done.losses) == 80
    assert sum(done.losses[-10:]) < 0.3 * sum(done.losses[:10])
    assert distance(model, teacher) < 0.3 * before


def test_the_loss_is_the_distance_to_the_teacher_whatever_the_images_are():
    teacher, model = Denoiser(), Denoiser(seed=1)
    objective = make_objective(model, DDPMScheduler())
    images, noise = batches(1)[0], torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    t = torch.arange(16) * 60
    loss = Distillation(teacher.eval(), objective)(model.eval(), images, t, noise)
    noisy = objective.noisy(images, t, noise)
    torch.testing.assert_close(loss, (model(noisy, t) - teacher(noisy, t)).square().mean())


@pytest.mark.parametrize("share", [0.7, 0.25])
def test_the_rest_of_the_share_is_the_objectives_own_loss(share):
    teacher, model = Denoiser().eval(), Denoiser(seed=1).eval()
    objective = make_objective(model, DDPMScheduler())
    given = (model, batches(1)[0], torch.arange(16) * 60, torch.ones(16, 1, 8, 8))
    mixed, pure = (Distillation(teacher, objective, s)(*given) for s in (share, 1.0))
    torch.testing.assert_close(mixed, share * pure + (1 - share) * objective.loss(*given))


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), FlowMatchEulerDiscreteScheduler()], ids=["ddpm", "flow"])
def test_model_and_teacher_are_given_the_same_inputs_and_conditioning(scheduler):
    teacher, model = Denoiser(classes=3).eval(), Denoiser(seed=1, classes=3)
    step = Distillation(teacher, make_objective(model, scheduler))
    labels = torch.arange(16) % 3
    with recorded(model) as ours, recorded(teacher) as theirs:
        step(model, (batches(1)[0], labels), torch.arange(16) * 60, torch.ones(16, 1, 8, 8))
    assert len(ours) == len(theirs) == 1
    assert ours[0].kwargs.keys() == theirs[0].kwargs.keys() == {"sample", "timestep", "class_labels"}
    assert all(torch.equal(ours[0].kwargs[name], theirs[0].kwargs[name]) for name in ours[0].kwargs)
    assert torch.equal(theirs[0].kwargs["class_labels"], labels)


def test_the_teacher_is_left_as_it_was():
    teacher = Denoiser().train()
    teacher.last.eval()
    teacher.first.bias.requires_grad_(False)
    before = copy.deepcopy(teacher.state_dict())
    run(Denoiser(seed=1), teacher)
    assert all(torch.equal(p, before[name]) for name, p in teacher.state_dict().items())
    assert (teacher.training, teacher.dropout.training, teacher.last.training) == (True, True, False)
    assert [n for n, p in teacher.named_parameters() if not p.requires_grad] == ["first.bias"]
    assert all(p.grad is None for p in teacher.parameters())
    assert not teacher._forward_hooks


def test_modes_and_hooks_of_the_model_are_as_before_also_after_an_error():
    model = Denoiser(seed=1).train()
    model.last.eval()
    run(model, Denoiser())
    with pytest.raises(ValueError, match="the loader is empty"):
        run(model, Denoiser(), [])
    assert (model.training, model.dropout.training, model.last.training) == (True, True, False)
    assert not model._forward_hooks


def test_same_seed_same_weights_another_seed_others():
    models = [Denoiser(seed=1) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1)):
        run(model, Denoiser(), seed=seed)
    first, second, third = (model.first.weight for model in models)
    torch.testing.assert_close(first, second)
    assert not torch.allclose(first, third)


def test_a_teacher_in_single_precision_serves_a_model_in_half():
    teacher = Denoiser()
    model = copy.deepcopy(teacher).to(torch.bfloat16)
    done = run(model, teacher, lr=1e-5)
    assert 0 < max(done.losses) < 1e-3


def test_own_losses_are_distilled_at_what_they_call_the_model_with():
    teacher, model = Denoiser(), Denoiser(seed=1)
    before = distance(model, teacher)

    def never_twice_the_same(model: nn.Module, batch: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Its noise is its own, so the teacher can't be asked by calling it again."""
        return model(batch + torch.randn_like(batch), t).mean()

    same = run(copy.deepcopy(teacher).double(), copy.deepcopy(teacher).double(), batches(dtype=torch.float64),
               loss_fn=never_twice_the_same)  # fmt: skip
    assert max(same.losses) < 1e-20
    run(model, teacher, steps=80, loss_fn=never_twice_the_same)
    assert distance(model, teacher) < 0.3 * before


def test_an_own_loss_that_never_calls_the_model_is_named():
    def by_its_parts(model: Denoiser, batch: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return model.last(model.first(batch)).square().mean()

    with pytest.raises(ValueError, match="loss_fn never called Denoiser itself"):
        run(Denoiser(seed=1), Denoiser(), loss_fn=by_its_parts)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_autoencoders_learn_the_teachers_reconstructions(share):
    torch.manual_seed(0)
    teacher = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2, sample_size=8).eval()
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model.decoder.conv_out.weight.mul_(0.5)
    images = [torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1]
    step = Distillation(teacher, make_objective(model), share)
    given = (model.eval(), images[0], torch.zeros(8, dtype=torch.long), torch.zeros(8, 3, 8, 8))
    pure = (model(images[0]).sample - teacher(images[0]).sample).square().mean()
    expected = share * pure + (1 - share) * make_objective(model).loss(*given)
    torch.testing.assert_close(step(*given), expected)
    done = finetune(model, images, steps=20, lr=1e-3, teacher=teacher, progress=False)
    assert done.losses[-1] < 0.7 * done.losses[0]


@pytest.fixture
def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), block_out_channels=(8,),
    ).eval()  # fmt: skip


def test_a_folder_of_diffusers_is_a_teacher(unet, tmp_path):
    unet.save_pretrained(tmp_path)
    done = run(copy.deepcopy(unet), tmp_path, lr=1e-6)
    assert max(done.losses) < 1e-8
    assert run(copy.deepcopy(unet), str(tmp_path), lr=1e-6).losses == pytest.approx(done.losses, abs=1e-8)


def test_a_pruned_model_in_a_folder_is_a_teacher(unet, tmp_path):
    from diffprune_fast import score_and_prune

    result = score_and_prune(unet, None, criterion="magnitude", ratio=0.5, round_to=4, inplace=False)
    result.save_pretrained(tmp_path)
    assert max(run(result.model, tmp_path, lr=1e-6).losses) < 1e-8


def test_folders_without_a_model_are_named(unet, tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        run(unet, tmp_path / "nothing")
    unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="there are unet in it"):
        run(unet, tmp_path)
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    (tmp_path / "unet" / "config.json").write_text(json.dumps({**config, "_class_name": "NoModel"}))
    with pytest.raises(RuntimeError, match="'NoModel' is not a model of diffusers"):
        run(unet, tmp_path / "unet")


def test_a_teacher_that_would_be_trained_too_is_refused():
    model, shares = Denoiser(), Denoiser(seed=1)
    shares.last = model.last
    for teacher in (model, shares):
        with pytest.raises(ValueError, match="shares weights with the model"):
            run(model, teacher)


def test_teachers_of_another_kind_or_of_other_outputs_are_refused():
    class Wide(Denoiser):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return super().forward(sample, timestep).repeat(1, 2, 1, 1)

    with pytest.raises(TypeError, match=r"teacher is a dict: give a module \(of a pipeline the component"):
        run(Denoiser(), {})
    with pytest.raises(ValueError, match=r"the teacher answers \(16, 2, 8, 8\) where the model answers"):
        run(Denoiser(), Wide())
    with pytest.raises(ValueError, match="the teacher, a Linear, can't be called as the model is"):
        run(Denoiser(), nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clip": 0.0}, "clip is 0.0"),
        ({"clip": -1.0}, "clip is -1.0"),
        ({"clip": math.nan}, "clip is nan"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"ema": 2}, "ema is 2"),
        ({"ema": -0.1}, "ema is -0.1"),
        ({"warmup": -5}, "warmup is -5"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": -1e-3}, "lr is -0.001"),
        ({"lr": math.nan}, "lr is nan"),
        ({"teacher_share": 0.0}, "teacher_share is 0.0: it must be above 0"),
        ({"teacher_share": 1.5}, "teacher_share is 1.5"),
        ({"teacher_share": 0.5, "teacher": None}, "there is no teacher"),
    ],
)
def test_settings_that_cannot_train_are_refused_before_anything_changes(arguments, message):
    model = Denoiser()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        run(model, **{"teacher": Denoiser(seed=1), **arguments})
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
