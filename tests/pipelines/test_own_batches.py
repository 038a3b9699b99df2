"""Batches that a pipeline makes itself, ready to score its denoiser with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_pipelines import PIPELINES, made
from torch import Tensor

from diffprune_fast import score_and_prune
from diffprune_fast.pipelines.own_samples import own_batches

# Schedulers of diffusers hand tensors to NumPy 2 in a way that it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPTS = ["a red cat", "a small green house"]
WITHOUT_TEXT = ("ddpm", "ldm", "dit")


def call(name: str) -> dict[str, Any]:
    """Small images, and short texts where the default would be long."""
    if name in WITHOUT_TEXT:
        return {}
    short = {"max_sequence_length": 8} if name in ("flux", "sd3", "pixart") else {}
    return {"height": 16, "width": 16, **short, **({"use_resolution_binning": False} if name == "pixart" else {})}


def own(name: str, pipe: Any = None, prompts: Any = PROMPTS, **arguments: Any) -> Any:
    given = {"n": 5, "batch": 3, "steps": 2, "progress": False, **call(name), **arguments}
    return own_batches(pipe or made(name), None if name in WITHOUT_TEXT else prompts, **given)


def parts(batch: Any) -> tuple[Tensor, Any]:
    if isinstance(batch, dict):
        return batch["images"], batch["captions"]
    return (batch, None) if isinstance(batch, Tensor) else batch


@pytest.mark.parametrize("name", PIPELINES)
def test_batches_are_images_with_what_they_were_made_of(name):
    batches = [parts(b) for b in own(name)]
    images = torch.cat([x for x, _ in batches])
    assert [len(x) for x, _ in batches] == [3, 2]
    assert images.shape == (5, 3, 16, 16)
    assert float(images.amin()) >= -1
    assert float(images.amax()) <= 1
    assert float(images.amin()) < 0 < float(images.std())
    if name == "dit":
        labels = torch.cat([y for _, y in batches])
        assert labels.dtype == torch.long
        assert 0 <= int(labels.amin()) <= int(labels.amax()) < 1000
    elif name in WITHOUT_TEXT:
        assert [y for _, y in batches] == [None, None]
    else:
        assert [y for _, y in batches] == [[PROMPTS[0], PROMPTS[1], PROMPTS[0]], [PROMPTS[1], PROMPTS[0]]]


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_is_pruned_with_nothing_but_its_own_samples(name):
    pipe = made(name)
    result = score_and_prune(
        pipe, own(name, pipe, n=8, batch=4), ratio=0.3, round_to=1, criterion="taylor", micro_batch=4, max_samples=8,
        progress=False,
    )  # fmt: skip
    assert result.after.params < result.before.params


def test_same_seed_same_images_another_seed_others():
    pipe = made("stable_diffusion")
    one, two, three = (parts(next(iter(own("stable_diffusion", pipe, seed=s))))[0] for s in (0, 0, 1))
    torch.testing.assert_close(one, two, atol=2 / 255, rtol=0)
    assert not torch.allclose(one, three, atol=2 / 255)


def test_nothing_is_made_before_it_is_asked_for_and_nothing_twice():
    pipe = made("ddpm")
    calls = []
    handle = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    loader = own("ddpm", pipe)
    assert calls == []
    list(loader)
    once = len(calls)
    list(loader)
    handle.remove()
    assert once == len(calls) == 4


def test_an_ancestral_sampler_is_replaced_by_a_deterministic_one():
    """DDPM's own steps draw noise: the last of few steps would leave grain."""
    pipe = made("ddpm")
    loader = own("ddpm", pipe)
    assert type(loader._pipe.scheduler).__name__ == "DDIMScheduler"
    assert type(pipe.scheduler).__name__ == "DDPMScheduler"


def test_the_pipeline_is_as_before():
    pipe = made("stable_diffusion")
    pipe.unet.train()
    scheduler, config, state = pipe.scheduler, dict(pipe.scheduler.config), torch.get_rng_state()
    list(own("stable_diffusion", pipe))
    assert pipe.scheduler is scheduler
    assert dict(scheduler.config) == config
    assert scheduler.num_inference_steps is None
    assert pipe.unet.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad for p in pipe.unet.parameters())


def test_the_check_that_blackens_images_is_not_asked():
    pipe = made("stable_diffusion")
    pipe.register_modules(safety_checker=torch.nn.Linear(1, 1))
    checker = pipe.safety_checker
    assert parts(next(iter(own("stable_diffusion", pipe))))[0].std() > 0
    assert pipe.safety_checker is checker


def test_one_string_is_one_prompt():
    assert parts(next(iter(own("stable_diffusion", prompts="a cat"))))[1] == ["a cat"] * 3


@pytest.mark.parametrize(
    ("name", "prompts", "arguments", "error", "message"),
    [
        ("stable_diffusion", None, {}, ValueError, "makes images of text: give prompts"),
        ("ddpm", PROMPTS, {}, ValueError, "DDPMPipeline takes no text"),
        ("stable_diffusion", [], {}, ValueError, "there are no prompts"),
        ("stable_diffusion", ["a", 3], {}, TypeError, "there is a int among them"),
        ("ddpm", None, {"heigth": 8}, TypeError, r"DDPMPipeline takes no \['heigth'\]"),
        ("ddpm", None, {"n": 0}, ValueError, "n is 0"),
    ],
)
def test_what_the_pipeline_cannot_make_images_of_is_refused(name, prompts, arguments, error, message):
    with pytest.raises(error, match=message):
        own_batches(made(name), prompts, progress=False, **arguments)


def test_images_that_are_not_finite_are_named():
    pipe = made("stable_diffusion")
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN or infinite images"):
        next(iter(own("stable_diffusion", pipe)))
