"""Whole pipelines in one call: encoding, scoring, pruning, saving."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import PIPELINES, TOKENS, kl, made
from torch import Tensor, nn
from typer.testing import CliRunner
from zoo_image_transformers import IMAGE_TRANSFORMERS

import diffprune_fast as dpf
from diffprune_fast.checkpoint import CheckpointError
from diffprune_fast.checkpoint.manifest import CONFIG, read_manifest
from diffprune_fast.cli import app
from diffprune_fast.objective import ImageFolder
from diffprune_fast.objective.nested import tensors_in
from diffprune_fast.objective.randomness import own_randomness
from diffprune_fast.pipelines.encoding import encoded
from diffprune_fast.recovery.finetune import finetune

# Schedulers of diffusers hand tensors to NumPy 2 in a way that it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

# "taylor" takes all timesteps: no loss curve is measured first. Compensating takes half of the time.
QUICK: dict[str, Any] = {
    "criterion": "taylor",
    "micro_batch": 4,
    "min_samples": 16,
    "max_samples": 16,
    "progress": False,
    "round_to": 1,
    "compensate": False,
}
CAPTIONS = ["a red cat", "a small green house", "", "tree"]
UNCONDITIONAL = ("ddpm", "ldm")
# Of a sampled pixel in [0, 1], in single precision.
ROUNDING = 1e-4


def images(n: int = 4, channels: int = 3, size: int = 16) -> Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def beside(name: str) -> dict[str, Any]:
    """What the loader gives beside the images; the text's length where the default would be long."""
    if name in UNCONDITIONAL:
        return {}
    if name == "dit":
        return {"class_labels": torch.tensor([3, 1, 4, 1])}
    return {"captions": CAPTIONS} | ({"max_sequence_length": 8} if name in ("flux", "sd3", "pixart") else {})


def loader(name: str) -> list[Any]:
    return [{"images": images(), **beside(name)}]


def sampled(name: str, pipe: Any) -> np.ndarray:
    """Two images of 16x16."""
    given: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np", "generator": torch.manual_seed(5)}
    if name in UNCONDITIONAL:
        given["batch_size"] = 2
    elif name == "dit":
        given |= {"class_labels": [3, 1], "guidance_scale": 1.0}
    else:
        given |= {**beside(name), "prompt": CAPTIONS[:2], "height": 16, "width": 16}
        del given["captions"]
    if name == "pixart":
        given |= {"use_resolution_binning": False, "clean_caption": False}
    return pipe(**given).images


def state(pipe: Any) -> dict[str, Any]:
    """Everything of a pipeline that must survive: tensors, modes, configs, its own attributes."""
    modules = {n: m for n, m in pipe.components.items() if isinstance(m, nn.Module)}
    tensors = {f"{n}.{k}": t.clone() for n, m in modules.items() for k, t in m.state_dict().items()}
    return {
        "tensors": tensors,
        "identity": {f"{n}.{k}": id(p) for n, m in modules.items() for k, p in m.named_parameters()},
        "modes": {f"{n}.{k}": x.training for n, m in modules.items() for k, x in m.named_modules()},
        "hooks": {n: len(m._forward_pre_hooks) for n, m in modules.items()},
        "components": {n: id(c) for n, c in pipe.components.items()},
        "config": dict(pipe.config),
        "attributes": {k: repr(v) for k, v in vars(pipe).items()},
        "scheduler": {k: repr(v) for k, v in vars(pipe.scheduler).items()},
    }


def assert_same(one: Mapping[str, Any], two: Mapping[str, Any]) -> None:
    for what in one:
        if what == "tensors":
            assert one[what].keys() == two[what].keys()
            assert all(torch.equal(t, two[what][n]) for n, t in one[what].items())
        else:
            assert one[what] == two[what], what


def assert_loaded(name: str, again: Any, pipe: Any) -> None:
    """Equal weights to the bit, equal images to rounding: libraries choose kernels by address and threads."""
    for what, module in pipe.components.items():
        if isinstance(module, nn.Module):
            state = again.components[what].state_dict()
            assert module.state_dict().keys() == state.keys()
            assert all(torch.equal(t, state[n]) for n, t in module.state_dict().items()), what
    np.testing.assert_allclose(sampled(name, again), sampled(name, pipe), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_is_pruned_samples_and_comes_back_the_same(name: str, tmp_path: Any) -> None:
    pipe = made(name)
    dense = sampled(name, pipe)
    denoiser = "unet" if hasattr(pipe, "unet") else "transformer"
    before = {n: sum(p.numel() for p in m.parameters()) for n, m in pipe.components.items() if isinstance(m, nn.Module)}

    result = dpf.score_and_prune(pipe, loader(name), ratio=0.3, **{**QUICK, "compensate": True})

    assert result.pipeline is pipe
    assert result.compensation is not None
    assert result.component == denoiser
    assert result.model is getattr(pipe, denoiser)
    after = {n: sum(p.numel() for p in m.parameters()) for n, m in pipe.components.items() if isinstance(m, nn.Module)}
    assert result.after.params == after.pop(denoiser) < 0.85 * before.pop(denoiser)
    assert after == before
    pruned = sampled(name, pipe)
    assert pruned.shape == dense.shape == (2, 16, 16, 3)
    assert np.isfinite(pruned).all()
    assert not np.allclose(pruned, dense, atol=ROUNDING)

    result.save_pretrained(tmp_path)
    again = dpf.pipeline_from_pretrained(tmp_path)
    assert type(again) is type(pipe)
    again.set_progress_bar_config(disable=True)
    assert_loaded(name, again, pipe)


class Stepped(tuple):
    """What a scheduler's step answers, in both of its forms."""

    @property
    def prev_sample(self) -> Tensor:
        return self[0]


@pytest.mark.parametrize("name", [n for n in PIPELINES if n != "ddpm"])
def test_the_pipeline_decodes_our_latents_to_what_the_vae_decodes(name: str) -> None:
    """Scaling, shift, means and packing are the inverse of the pipeline's own."""
    pipe = made(name)
    torch.manual_seed(3)
    batch = next(iter(encoded(pipe, loader(name))))
    latents = next(iter(batch.values()))
    torch.manual_seed(3)
    vae = pipe.vqvae if name == "ldm" else pipe.vae
    with torch.no_grad():
        answer = vae.encode(images())
        raw = answer.latents if name == "ldm" else answer.latent_dist.sample()
        expected = (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    pipe.scheduler.step = lambda *_, **__: Stepped([latents[:2]])
    np.testing.assert_allclose(sampled(name, pipe), expected[:2], atol=1e-5)


def test_scores_are_those_of_latents_and_embeddings_made_by_hand() -> None:
    pipe = made("stable_diffusion")
    batches = [(images(), CAPTIONS), (images().flip(0), CAPTIONS[::-1])]
    by_hand = []
    with own_randomness(11), torch.no_grad():
        for pixels, captions in batches:
            latents = pipe.vae.encode(pixels).latent_dist.sample() * pipe.vae.config.scaling_factor
            tokens = pipe.tokenizer(captions, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
            by_hand.append({"sample": latents, "encoder_hidden_states": pipe.text_encoder(tokens)[0]})
    options = {"micro_batch": 4, "max_samples": 8, "timesteps": range(1000), "progress": False, "seed": 11}
    expected = dpf.score(pipe.unet, by_hand, dpf.trace(pipe.unet), scheduler=pipe.scheduler, **options)
    result = dpf.score_and_prune(pipe, batches, ratio=0.3, inplace=False, rotate=False, compensate=False, **options)
    assert result.scores is not None
    assert result.scores.values.max() > 0
    np.testing.assert_allclose(result.scores.values, expected.values, rtol=1e-4)


def test_a_copy_leaves_the_pipeline_and_the_loader_alone() -> None:
    pipe = made("stable_diffusion")
    generator = torch.Generator().manual_seed(2)
    pairs = [*zip(images(), CAPTIONS)]
    shuffled: Any = torch.utils.data.DataLoader(pairs, batch_size=2, shuffle=True, generator=generator)  # type: ignore[arg-type]
    before, random, order = state(pipe), torch.get_rng_state(), generator.get_state()
    result = dpf.score_and_prune(pipe, shuffled, ratio=0.3, inplace=False, **QUICK)
    assert_same(state(pipe), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(generator.get_state(), order)
    assert result.pipeline is not pipe
    assert result.pipeline.unet is result.model is not pipe.unet
    assert result.pipeline.vae is pipe.vae
    assert np.isfinite(sampled("stable_diffusion", result.pipeline)).all()


WRONG: dict[str, tuple[str, Any, dict[str, Any], type[Exception], str]] = {
    "no captions": ("stable_diffusion", [images()], {}, ValueError, "StableDiffusionPipeline needs captions"),
    "no labels": ("dit", [images()], {}, ValueError, "DiTPipeline needs class labels"),
    "too few captions": ("stable_diffusion", [(images(), CAPTIONS[:2])], {}, ValueError, "4 images, but 2 entries"),
    "unknown component": (
        "stable_diffusion",
        loader("stable_diffusion"),
        {"component": "transformer"},
        ValueError,
        r"no component 'transformer'.* text_encoder, unet, vae",
    ),
    "no loss known": (
        "stable_diffusion",
        loader("stable_diffusion"),
        {"component": "text_encoder"},
        ValueError,
        r"text_encoder \(CLIPTextModel\) is neither a denoiser nor an autoencoder",
    ),
    "grey images": ("sdxl", [(images(channels=1), CAPTIONS)], {}, ValueError, "takes images of 3 channels"),
    "grey images for the VAE": ("ldm", [images(channels=1)], {"component": "vqvae"}, ValueError, "3 channels"),
    "grey pixels": ("ddpm", [images(channels=1)], {}, ValueError, "takes images of 3 channels"),
    "NaN": ("flux", [(images() * np.nan, CAPTIONS)], {}, ValueError, "NaN or infinity"),
    "another size": ("ldm", [images(size=32)], {}, ValueError, r"\(4, 3, 8, 8\).*become \(4, 3, 16, 16\)"),
    "an odd size": ("sd3", [(images(size=15), CAPTIONS)], {}, ValueError, "can't be called with images of 15x15"),
    "no images": ("ldm", [{"pixels": images()}], {}, TypeError, "no batch for a pipeline"),
    "three things": ("ldm", [(images(), images(), CAPTIONS)], {}, TypeError, "no batch for a pipeline"),
    "empty": ("pixart", [], {}, ValueError, "loader is empty"),
    "prompts": ("ddpm", ["a cat"], {}, ValueError, "takes no text"),
    "no iterable": ("ddpm", 3, {}, TypeError, "loader must be an iterable"),
    "budget out of reach": ("dit", loader("dit"), {"macs": 1e-6}, ValueError, "can't be met"),
    "typing mistake": ("ddpm", [images()], {"componet": "unet"}, TypeError, "did you mean 'component'"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_mistake_is_one_clear_error_and_the_pipeline_untouched(what: str) -> None:
    name, batches, options, error, words = WRONG[what]
    pipe = made(name)
    before, random = state(pipe), torch.get_rng_state()
    with pytest.raises(error, match=words):
        dpf.score_and_prune(pipe, batches, **{**QUICK, **options})
    assert_same(state(pipe), before)
    assert torch.equal(torch.get_rng_state(), random)


def test_an_offloaded_denoiser_is_refused() -> None:
    pipe = made("ddpm")
    pipe.unet._hf_hook = object()
    with pytest.raises(ValueError, match=r"unet is offloaded.*remove_all_hooks"):
        dpf.score_and_prune(pipe, [images()], **QUICK)


def test_a_pipeline_that_begins_with_an_image_is_refused() -> None:
    components = made("stable_diffusion").components
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**components, requires_safety_checker=False)
    with pytest.raises(ValueError, match=r"StableDiffusionImg2ImgPipeline can't be called.*AutoPipelineForText2Image"):
        dpf.score_and_prune(pipe, [(images(), CAPTIONS)], **QUICK)


def test_a_pipeline_with_a_controlnet_is_refused() -> None:
    pipe = made("stable_diffusion")
    controlnet = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8))
    steered = diffusers.StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=controlnet, requires_safety_checker=False
    )
    with pytest.raises(ValueError, match="steered by a network that looks at the noisy images"):
        dpf.score_and_prune(steered, [(images(), CAPTIONS)], **QUICK)


def test_component_is_for_pipelines() -> None:
    with pytest.raises(ValueError, match="UNet2DModel is none"):
        dpf.score_and_prune(made("ddpm").unet, [images()], component="unet", **QUICK)


@pytest.mark.parametrize(("name", "vae"), [("stable_diffusion", "vae"), ("ldm", "vqvae")])
def test_the_vae_is_pruned_by_name(name: str, vae: str, tmp_path: Any) -> None:
    pipe = made(name)
    denoiser = {k: t.clone() for k, t in pipe.unet.state_dict().items()}
    latents = pipe.components[vae].config.latent_channels
    result = dpf.score_and_prune(pipe, loader(name), component=vae, ratio=0.3, **QUICK)
    assert result.model is pipe.components[vae]
    assert result.after.params == sum(p.numel() for p in result.model.parameters()) < 0.85 * result.before.params
    assert all(torch.equal(t, denoiser[k]) for k, t in pipe.unet.state_dict().items())
    with torch.no_grad():
        answer = result.model.encode(images())
    assert (answer.latent_dist.mode() if vae == "vae" else answer.latents).shape == (4, latents, 8, 8)
    pruned = sampled(name, pipe)
    assert np.isfinite(pruned).all()
    result.save_pretrained(tmp_path)
    again = dpf.pipeline_from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert_loaded(name, again, pipe)


def test_the_pipelines_own_save_writes_what_can_be_read(tmp_path: Any) -> None:
    """Unevenly pruned, loaded, finetuned, saved by the pipeline and loaded again."""
    pipe = made("stable_diffusion")
    dpf.score_and_prune(pipe, loader("stable_diffusion"), ratio=0.3, **QUICK)
    pipe.save_pretrained(tmp_path / "once")
    assert read_manifest(tmp_path / "once" / "unet")["plain_config"] is False
    loaded = dpf.pipeline_from_pretrained(tmp_path / "once")
    loaded.set_progress_bar_config(disable=True)
    assert_loaded("stable_diffusion", loaded, pipe)
    finetune(
        loaded.unet, encoded(loaded, loader("stable_diffusion")), loaded.scheduler, steps=2, ema=0.0, progress=False
    )
    tuned = sampled("stable_diffusion", loaded)
    assert not np.allclose(tuned, sampled("stable_diffusion", pipe), atol=ROUNDING)
    loaded.save_pretrained(tmp_path / "twice")
    again = dpf.pipeline_from_pretrained(tmp_path / "twice")
    again.set_progress_bar_config(disable=True)
    assert_loaded("stable_diffusion", again, loaded)
    first, second = (read_manifest(tmp_path / d / "unet") for d in ("once", "twice"))
    assert first["plan"] == second["plan"]
    assert all((units == second["keep"][n]).all() for n, units in first["keep"].items())


def test_diffusers_loads_a_pipeline_whose_pruned_component_a_plain_config_describes(tmp_path: Any) -> None:
    pipe = made("sd3")
    dpf.score_and_prune(pipe, None, component="vae", criterion="magnitude", ratio=0.5, round_to=1)
    pipe.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "vae" / CONFIG).read_text())
    assert config["block_out_channels"] == [8, 8]
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert_loaded("sd3", again, pipe)


def test_loading_does_not_warn_of_what_we_call_diffusers_with(tmp_path: Any) -> None:
    made("ddpm").save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        dpf.pipeline_from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert not [w for w in seen if "dtype" in str(w.message)]


def test_diffusers_refuses_an_unevenly_pruned_pipeline(tmp_path: Any) -> None:
    pipe = made("ddpm")
    dpf.score_and_prune(pipe, [images()], ratio=0.3, **QUICK)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"diffprune_fast\.from_pretrained"):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="load it with pipeline_from_pretrained"):
        dpf.from_pretrained(tmp_path)


def test_diffusers_refuses_a_pipeline_without_some_blocks(tmp_path: Any) -> None:
    pipe = made("ddpm")
    dpf.score_and_prune(pipe, [images()], params=0.7, drop_blocks="mid_block.resnets.0", **QUICK)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"diffprune_fast\.from_pretrained"):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    again = dpf.pipeline_from_pretrained(tmp_path)
    assert again.unet.num_parameters() == pipe.unet.num_parameters()


class Opened(Exception):
    pass


class Trap:
    """Opening the pickle raises."""

    def __reduce__(self) -> Any:
        return Opened, ()


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_no_pickle_is_opened(component: str, tmp_path: Any) -> None:
    pipe = made("stable_diffusion")
    dpf.score_and_prune(pipe, None, criterion="magnitude", ratio=0.3).save_pretrained(tmp_path)
    (weights,) = (tmp_path / component).glob("*.safetensors")
    stem = "pytorch_model" if component == "text_encoder" else weights.stem
    (weights.parent / f"{stem}.bin").write_bytes(pickle.dumps(Trap()))
    weights.unlink()
    with pytest.raises(CheckpointError):
        dpf.pipeline_from_pretrained(tmp_path)


@pytest.mark.parametrize("missing", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_an_incomplete_pipeline_is_refused(missing: str, tmp_path: Any) -> None:
    pipe = made("ddpm")
    dpf.score_and_prune(pipe, None, criterion="magnitude", ratio=0.3).save_pretrained(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(CheckpointError):
        dpf.pipeline_from_pretrained(tmp_path)


def test_embeddings_stand_in_for_captions_and_encoders() -> None:
    """Arguments of the pipeline's call that a dict names are handed on: the text encoders needn't be there."""
    pipe = made("stable_diffusion")
    with_captions = next(iter(encoded(pipe, [(images(), CAPTIONS)])))
    embeddings = pipe.encode_prompt(CAPTIONS, "cpu", 1, False)[0].detach()
    without = diffusers.StableDiffusionPipeline(
        **{**pipe.components, "text_encoder": None, "tokenizer": None}, requires_safety_checker=False
    )
    batch = next(iter(encoded(without, [{"images": images(), "prompt_embeds": embeddings}])))
    torch.testing.assert_close(batch["encoder_hidden_states"], with_captions["encoder_hidden_states"])
    result = dpf.score_and_prune(without, [{"images": images(), "prompt_embeds": embeddings}], ratio=0.3, **QUICK)
    assert result.after.params < result.before.params


@pytest.mark.parametrize("kind", ["tiny", "deep compression", "half precision"])
def test_latents_of_other_vaes_decode_to_what_they_were_made_from(kind: str) -> None:
    torch.manual_seed(0)
    vae: Any
    if kind == "tiny":
        vae = diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            scaling_factor=0.7,
        )
    elif kind == "deep compression":
        vae = deep_compression()
    else:
        vae = kl(force_upcast=True).half()
    pipe = made("dit", vae=vae)
    latents = next(iter(encoded(pipe, loader("dit"))))["hidden_states"]
    assert latents.dtype == torch.float32
    with torch.no_grad():
        if kind == "half precision":
            raw = vae.encode(images().half()).latent_dist
            distance = (latents / vae.config.scaling_factor - raw.mean).abs() / raw.std
            assert 0.3 < distance.mean() < 1.5  # a draw from the distribution: 0.8 for a normal one
            assert next(vae.parameters()).dtype == torch.float16
        else:
            raw = next(iter(vae.encode(images()).values()))
            torch.testing.assert_close(latents, raw * vae.config.scaling_factor)


def deep_compression() -> Any:
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.4,
    ).eval()


def test_an_autoencoder_without_known_inputs_keeps_its_latents() -> None:
    """encode and decode are traced apart, from the loader's first batch."""
    torch.manual_seed(0)
    vae = deep_compression()
    result = dpf.score_and_prune(vae, [images()], ratio=0.3, **QUICK)
    assert result.after.params == sum(p.numel() for p in vae.parameters()) < result.before.params
    assert result.proof.error < 1e-4  # its attentions have a grouped convolution whose groups must stay
    with torch.no_grad():
        latents = vae.encode(images()).latent
        assert latents.shape == (4, 4, 8, 8)
        assert vae.decode(latents).sample.shape == (4, 3, 16, 16)


def test_example_inputs_come_from_the_first_batch_which_is_not_lost() -> None:
    """A class without known inputs, and a loader that can be walked only once."""
    transformer = made("dit").transformer
    batches = [(images(4, 4, 8) + i, torch.tensor([3, 1, 4, i])) for i in range(4)]
    seen: list[int] = []

    def once() -> Any:
        for i, batch in enumerate(batches):
            seen.append(i)
            yield batch

    options: dict[str, Any] = {**QUICK, "inplace": False, "ratio": 0.3, "timesteps": range(1000)}
    given = {"hidden_states": batches[0][0][:1], "timestep": torch.tensor([5]), "class_labels": torch.tensor([3])}
    by_hand = dpf.score_and_prune(transformer, batches, example_inputs=given, **options)
    found = dpf.score_and_prune(transformer, once(), **options)
    assert seen == [0, 1, 2, 3]
    assert found.plan.hash == by_hand.plan.hash
    assert found.scores is not None
    assert by_hand.scores is not None
    np.testing.assert_allclose(found.scores.values, by_hand.scores.values, rtol=1e-4)


def test_example_inputs_are_what_a_loss_fn_calls_the_model_with() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 16), nn.Linear(16, 6)

        def forward(self, points: Tensor, *, gate: Tensor) -> Tensor:
            return self.two(torch.relu(self.one(points)) * gate)

    torch.manual_seed(0)
    model = Gated()

    def loss(model: nn.Module, batch: Any, t: Tensor, noise: Tensor) -> Tensor:
        return (model(batch + noise, gate=t[:, None] / 1000) - noise).square().mean(1)

    result = dpf.score_and_prune(model, [torch.randn(8, 6)], loss_fn=loss, ratio=0.5, **QUICK)
    assert model.one.weight.shape == (8, 6)
    assert result.model is model
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("name", ["stable_diffusion", "sdxl", "sd3", "flux", "pixart"])
def test_encoding_happens_where_the_encoders_are(name: str) -> None:
    """The denoiser may be on another device: here on one where nothing can be computed."""
    pipe = made(name)
    torch.manual_seed(3)
    expected = next(iter(encoded(pipe, loader(name))))
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    denoiser.to("meta")
    torch.manual_seed(3)
    found = next(iter(encoded(pipe, loader(name))))
    pairs = list(zip(tensors_in(found), tensors_in(expected), strict=True))
    assert len(pairs) > 1
    for a, b in pairs:
        torch.testing.assert_close(a, b)


class Scaling(diffusers.DiffusionPipeline):
    """A pipeline with its own idea of what the VAE's latents are multiplied with."""

    def __init__(self, unet: nn.Module, vae: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler)
        self.factor = self.time_unit = 1.0

    @torch.no_grad()
    def __call__(self, batch_size: int = 1, num_inference_steps: int = 2, generator: Any = None) -> Any:
        latents = torch.randn(batch_size, 3, 8, 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            latents = self.scheduler.step(self.unet(latents, t * self.time_unit).sample, t, latents).prev_sample
        return self.vae.decode(latents * self.factor).sample


def test_a_pipeline_that_does_not_scale_gets_latents_as_they_are_and_another_is_refused() -> None:
    pipe = Scaling(made("ldm").unet, kl(3), diffusers.DDPMScheduler())
    before = state(pipe)
    torch.manual_seed(3)
    latents = next(iter(encoded(pipe, [images()])))["sample"]
    torch.manual_seed(3)
    with torch.no_grad():
        torch.testing.assert_close(latents, pipe.vae.encode(images()).latent_dist.sample())
    pipe.factor = 1 / pipe.vae.config.scaling_factor
    scaled = next(iter(encoded(pipe, [images()])))["sample"]
    assert (scaled.std() / latents.std()).item() == pytest.approx(pipe.vae.config.scaling_factor, rel=0.1)
    pipe.factor = 1.1
    with pytest.raises(ValueError, match=r"Scaling scales the latents of its AutoencoderKL in a way"):
        dpf.score_and_prune(pipe, [images()], **QUICK)
    pipe.factor = 1.0
    assert_same(state(pipe), before)


def test_a_pipeline_that_tells_its_denoiser_another_time_than_the_loss_is_refused() -> None:
    pipe = Scaling(made("ldm").unet, kl(3), diffusers.FlowMatchEulerDiscreteScheduler())
    assert next(iter(encoded(pipe, [images()])))["sample"].shape == (4, 3, 8, 8)
    pipe.time_unit = 0.001
    with pytest.raises(ValueError, match=r"Scaling tells its UNet2DModel the time 1 where the loss would tell it 1000"):
        dpf.score_and_prune(pipe, [images()], **QUICK)


def _others() -> dict[str, Callable[[], Any]]:
    """Pipelines whose text encoders are too much for a test, with their smallest images."""
    transformers = {case.name: case.make for case in IMAGE_TRANSFORMERS}
    flow = diffusers.FlowMatchEulerDiscreteScheduler

    def parts(name: str, vae: Any) -> dict[str, Any]:
        model = transformers[f"{name}Transformer2DModel"]().float()
        return {"transformer": model, "vae": vae, "scheduler": flow(), "text_encoder": None, "tokenizer": None}

    def frames() -> Any:
        config: dict[str, Any] = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1}
        means: dict[str, Any] = {"latents_mean": [0.1, -0.2, 0.0, 0.3], "latents_std": [2.0, 0.5, 1.0, 1.5]}
        return diffusers.AutoencoderKLQwenImage(**config, temperal_downsample=[False], **means).eval()

    packed = {"scaling_factor": 1.5, "shift_factor": 0.06}
    return {
        "aura": lambda: diffusers.AuraFlowPipeline(**parts("AuraFlow", kl())),
        "chroma": lambda: diffusers.ChromaPipeline(**parts("Chroma", kl(2, **packed))),
        "qwen": lambda: diffusers.QwenImagePipeline(**parts("QwenImage", frames())),
        "sana": lambda: diffusers.SanaPipeline(**parts("Sana", deep_compression())),
    }


@pytest.mark.parametrize("name", ["aura", "chroma", "qwen", "sana"])
def test_other_pipelines_are_pruned_from_embeddings(name: str) -> None:
    torch.manual_seed(0)
    pipe = _others()[name]()
    pipe.set_progress_bar_config(disable=True)
    size = 32 if name == "sana" else 16
    mask = torch.ones(4, 7, dtype=torch.bool if name == "chroma" else torch.long)
    given = {"prompt_embeds": torch.randn(4, 7, 24)}
    given["prompt_embeds_mask" if name == "qwen" else "prompt_attention_mask"] = mask
    result = dpf.score_and_prune(pipe, [{"images": images(size=size), **given}], ratio=0.3, **QUICK)
    assert result.after.params == result.model.num_parameters() < 0.85 * result.before.params
    off = {"true_cfg_scale" if name == "qwen" else "guidance_scale": 1.0}
    off |= {"use_resolution_binning": False} if name == "sana" else {}
    image = pipe(**given, **off, height=size, width=size, num_inference_steps=2, output_type="np").images
    assert image.shape == (4, size, size, 3)
    assert np.isfinite(image).all()


def test_a_video_pipeline_takes_videos() -> None:
    torch.manual_seed(0)
    config: dict[str, Any] = {"dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=24, freq_dim=32, ffn_dim=32, num_layers=2
    )
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, **config).eval(),
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
    videos = torch.stack([images()] * 9, 2)
    batch = {"images": videos, "prompt_embeds": torch.randn(4, 7, 24)}
    assert next(iter(encoded(pipe, [batch])))["hidden_states"].shape == (4, 16, 3, 2, 2)
    result = dpf.score_and_prune(pipe, [batch], ratio=0.3, **QUICK)
    assert result.after.params == transformer.num_parameters() < 0.85 * result.before.params


def test_labels_reach_a_class_conditional_model_whose_pipeline_knows_none() -> None:
    pipe = made("ddpm", num_class_embeds=5)
    batch = next(iter(encoded(pipe, [(images(), torch.tensor([0, 4, 1, 2]))])))
    assert batch["class_labels"].tolist() == [0, 4, 1, 2]
    result = dpf.score_and_prune(pipe, [(images(), torch.tensor([0, 4, 1, 2]))], ratio=0.3, **QUICK)
    assert result.after.params < result.before.params
    with pytest.raises(ValueError, match="needs 'class_labels'"):
        dpf.score_and_prune(pipe, [images()], **QUICK)


@pytest.mark.parametrize("captions", ["metadata", "sidecars"])
def test_the_command_line_prunes_a_pipeline_from_images_and_captions(captions: str, tmp_path: Any) -> None:
    made("stable_diffusion").save_pretrained(tmp_path / "dense")
    (tmp_path / "photos" / "more").mkdir(parents=True)
    names = ["a.png", "more/b.png", "more/c.png"]
    for i, name in enumerate(names):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / name)
    arguments = ["prune", tmp_path / "dense", "--images", tmp_path / "photos", "--out", tmp_path / "out"]
    arguments += ["--batch-size", 3, "--max-samples", 6, "--ratio", 0.3]
    refused = CliRunner().invoke(app, [str(a) for a in arguments])
    assert refused.exit_code == 2
    assert "has no caption" in refused.stderr
    for name, caption in zip(names, CAPTIONS, strict=False):
        if captions == "sidecars":
            (tmp_path / "photos" / name).with_suffix(".txt").write_text(caption)
        else:
            with (tmp_path / "photos" / "metadata.jsonl").open("a") as f:
                f.write(json.dumps({"file_name": name, "text": caption}) + "\n")
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    assert f"diffprune_fast.pipeline_from_pretrained('{tmp_path / 'out'}')" in done.stdout
    manifest = read_manifest(tmp_path / "out" / "unet")
    pipe = dpf.pipeline_from_pretrained(tmp_path / "out")
    assert pipe.unet.num_parameters() == manifest["after"]["params"] < manifest["before"]["params"]
    folder = ImageFolder(tmp_path / "photos", (16, 16), captions=True)
    assert dict(zip([p.name for p in folder.paths], next(iter(folder))[1])) == dict(
        zip(["a.png", "b.png", "c.png"], CAPTIONS)
    )


def test_the_command_line_prunes_a_component_by_name(tmp_path: Any) -> None:
    made("ldm").save_pretrained(tmp_path / "dense")
    arguments = ["prune", tmp_path / "dense", "--component", "vqvae", "--criterion", "magnitude"]
    done = CliRunner().invoke(app, [str(a) for a in [*arguments, "--out", tmp_path / "out"]])
    assert done.exit_code == 0, done.output
    assert read_manifest(tmp_path / "out" / "vqvae")["model_class"] == "VQModel"
    wrong = CliRunner().invoke(app, [str(a) for a in [*arguments, "--component", "vae", "--out", tmp_path / "other"]])
    assert wrong.exit_code == 2
    assert "no component 'vae'" in wrong.stderr


def test_a_denoiser_without_known_inputs_is_pruned_and_traced_by_its_pipelines_call(tmp_path: Any) -> None:
    made("sd3").save_pretrained(tmp_path / "dense")
    pipe = made("sd3")
    plan = dpf.score_and_prune(pipe, loader("sd3"), ratio=0.3, inplace=False, **QUICK).plan
    before = state(pipe)
    result = dpf.score_and_prune(pipe, None, criterion="magnitude", ratio=0.3, inplace=False)
    assert_same(before, state(pipe))
    assert {n: g.n_units for n, g in zip(plan.position, plan.groups)} == {g.name: g.n_units for g in result.plan.groups}
    for arguments in ([tmp_path / "dense"], [tmp_path / "dense" / "transformer"]):
        traced = CliRunner().invoke(app, ["trace", *map(str, arguments)])
        assert traced.exit_code == 0, traced.output
        assert traced.stdout.strip() == str(result.plan)
    out = ["--criterion", "magnitude", "--out", tmp_path / "out"]
    alone = CliRunner().invoke(app, [str(a) for a in ["prune", tmp_path / "dense" / "transformer", *out]])
    assert "give its pipeline's folder with --component" in alone.stderr
    done = CliRunner().invoke(app, [str(a) for a in ["prune", tmp_path / "dense", *out]])
    assert done.exit_code == 0, done.output
    traced = CliRunner().invoke(app, ["trace", str(tmp_path / "out"), "--component", "vae"])
    assert traced.stdout.startswith("Plan of AutoencoderKL")


def test_the_command_line_says_what_has_no_loss_before_it_asks_for_images(tmp_path: Any) -> None:
    made("stable_diffusion").save_pretrained(tmp_path / "dense")
    arguments = ["prune", tmp_path / "dense", "--component", "text_encoder", "--out", tmp_path / "out"]
    refused = CliRunner().invoke(app, [str(a) for a in arguments])
    assert refused.exit_code == 2
    assert "text_encoder (CLIPTextModel) is neither a denoiser nor an autoencoder" in refused.stderr
