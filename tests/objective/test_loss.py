"""The training losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDPMScheduler,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from scoring_models import images, tiny
from torch import Tensor, nn

from diffprune_fast.objective import make_objective
from diffprune_fast.objective.conditioning import read_batch
from diffprune_fast.objective.loss import KL_WEIGHT


class Answers(nn.Module):
    """Remembers what it was asked and answers ``answer`` times the image."""

    def __init__(self, factor: float = 0.5, channels: int = 1) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))
        self.channels = channels
        self.asked: dict[str, Any] = {}

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        self.asked = {"sample": sample, "timestep": timestep, "encoder_hidden_states": encoder_hidden_states}
        return torch.cat([self.factor * sample] * self.channels, dim=1)


def setup() -> tuple[Tensor, Tensor, Tensor]:
    t = torch.tensor([0, 10, 500, 999])
    return images(4, 1), images(4, 2), t


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_noisy_images_and_targets_are_the_schedulers(kind: str) -> None:
    scheduler = DDPMScheduler(prediction_type=kind, beta_schedule="squaredcos_cap_v2")
    x, noise, t = setup()
    model = Answers()
    loss = make_objective(model, scheduler).loss(model, x, t, noise, reduction="none")
    noisy = scheduler.add_noise(x, noise, t)
    target = {"epsilon": noise, "v_prediction": scheduler.get_velocity(x, noise, t), "sample": x}[kind]
    torch.testing.assert_close(model.asked["sample"], noisy, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.asked["timestep"], t)
    expected = (0.5 * noisy - target).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_interpolates_and_asks_for_the_velocity(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    sigmas, times = scheduler.sigmas.flip(0).double(), scheduler.timesteps.flip(0).double()
    scheduler.set_timesteps(4)  # a scheduler in use has other sigmas: those of the training count
    x, noise, t = setup()
    model = Answers()
    loss = make_objective(model, scheduler).loss(model, x, t, noise, reduction="none")
    s = sigmas[t].view(-1, 1, 1, 1)
    noisy = (1 - s) * x + s * noise
    torch.testing.assert_close(model.asked["sample"], noisy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.asked["timestep"], times[t], rtol=1e-5, atol=1e-4)
    expected = (0.5 * noisy - (noise - x)).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_a_samplers_own_noise_scale_is_not_used() -> None:
    # Euler's add_noise is variance-exploding; its models were trained on the DDPM mixture of the same alphas
    x, noise, t = setup()
    ours = make_objective(Answers(), EulerDiscreteScheduler())
    ddpm = make_objective(Answers(), DDPMScheduler())
    torch.testing.assert_close(ours.noisy(x, t, noise), ddpm.noisy(x, t, noise))


def test_no_scheduler_is_the_default_ddpm() -> None:
    x, noise, t = setup()
    model = Answers()
    expected = make_objective(model, DDPMScheduler()).loss(model, x, t, noise)
    torch.testing.assert_close(make_objective(model).loss(model, x, t, noise), expected)


def test_the_three_reductions_agree() -> None:
    x, noise, t = setup()
    model = tiny()
    objective = make_objective(model)
    per_sample = objective.loss(model, x, t, noise, reduction="none")
    assert per_sample.shape == (4,)
    torch.testing.assert_close(objective.loss(model, x, t, noise), per_sample.mean())
    pixels = x[0].numel()
    torch.testing.assert_close(objective.loss(model, x, t, noise, reduction="pixel_sum"), per_sample.mean() * pixels)
    with pytest.raises(ValueError, match="unknown reduction 'sum'"):
        objective.loss(model, x, t, noise, reduction="sum")


def test_one_timestep_stands_for_all_images() -> None:
    x, noise, _ = setup()
    model = tiny()
    objective = make_objective(model)
    expected = objective.loss(model, x, torch.full((4,), 7), noise)
    torch.testing.assert_close(objective.loss(model, x, 7, noise), expected)


def test_a_learned_variance_is_left_out() -> None:
    x, noise, t = setup()
    plain = make_objective(Answers(), None)
    of_two, of_one = (plain.loss(Answers(channels=n), x, t, noise) for n in (2, 1))
    torch.testing.assert_close(of_two, of_one)


def test_an_answer_of_another_shape_is_an_error() -> None:
    x, noise, t = setup()
    with pytest.raises(ValueError, match=r"answers \(4, 9, 6, 6\) to images of \(4, 3, 6, 6\)"):
        make_objective(Answers(), None).loss(Answers(channels=3), x, t, noise)


def test_loss_fn_gets_the_batch_as_it_is() -> None:
    x, noise, t = setup()
    seen: list[Any] = []

    def loss_fn(model: nn.Module, batch: Any, t: Tensor, noise: Tensor) -> Tensor:
        seen.append(batch)
        return (model(batch["picture"], t) - noise).square().flatten(1).mean(1)

    model, batch = Answers(), {"picture": x, "caption": ["a", "b", "c", "d"]}
    objective = make_objective(model, DDPMScheduler(num_train_timesteps=50), loss_fn)
    assert objective.n_timesteps == 50
    assert objective.loss(model, batch, t, noise, reduction="none").shape == (4,)
    assert seen[0] is batch


def test_loss_fn_must_not_return_an_image() -> None:
    x, noise, t = setup()
    objective = make_objective(Answers(), None, lambda model, batch, t, noise: model(batch, t))
    with pytest.raises(ValueError, match=r"scalar or one loss per sample, \(batch,\); it returned \(4, 3, 6, 6\)"):
        objective.loss(Answers(), x, t, noise)


def test_a_scheduler_with_another_loss_is_refused() -> None:
    with pytest.raises(ValueError, match=r"EDMEulerScheduler .* is not known: pass loss_fn"):
        make_objective(Answers(), EDMEulerScheduler())


def test_a_model_without_timestep_needs_a_loss_fn() -> None:
    with pytest.raises(ValueError, match=r"Conv2d\.forward takes no timestep and is no autoencoder"):
        make_objective(nn.Conv2d(3, 3, 1))


def test_autoencoder_is_scored_by_reconstruction_and_a_little_kl() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2).double().eval()
    x = images(2)
    objective = make_objective(vae)
    assert (objective.kind, objective.n_timesteps) == ("reconstruction", 1)
    loss = objective.loss(vae, x, 0, torch.zeros_like(x), reduction="none")
    posterior = vae.encode(x).latent_dist
    error = (vae.decode(posterior.mode()).sample - x).square().flatten(1).mean(1)
    # Relative to the error as in training, where both are sums over an image.
    torch.testing.assert_close((loss - error) / KL_WEIGHT, posterior.kl() / x[0].numel())


def test_autoencoder_with_a_codebook_is_scored_by_reconstruction_and_commitment() -> None:
    torch.manual_seed(0)
    vae = VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=2, num_vq_embeddings=8).double().eval()
    x = images(2)
    loss = make_objective(vae).loss(vae, x, 0, torch.zeros_like(x), reduction="none")
    latents = vae.quant_conv(vae.encoder(x))
    _, commitment, _ = vae.quantize(latents)
    assert commitment > 0
    error = (vae(x).sample - x).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, error + commitment)


def test_every_part_of_an_autoencoder_that_rounds_its_latents_has_a_gradient() -> None:
    """AutoencoderTiny.forward rounds them to bytes, so that nothing would reach the encoder."""
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    x = torch.rand(2, 3, 8, 8)
    make_objective(vae).loss(vae, x, 0, torch.zeros_like(x)).backward()
    assert vae.encoder.layers[0].weight.grad.abs().max() > 0


def test_noise_is_the_generators_whatever_the_dtype() -> None:
    objective = make_objective(tiny())
    wide = objective.noise(images(4), torch.Generator().manual_seed(3))
    narrow = objective.noise(images(4).float(), torch.Generator().manual_seed(3))
    assert wide.dtype == torch.float64
    assert torch.equal(wide.float(), narrow)


def unet(**changes: Any) -> UNet2DModel:
    config = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 1,
        "block_out_channels": (8,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "norm_num_groups": 4,
        "add_attention": False,
    }
    return UNet2DModel(**{**config, **changes})


def conditional(**changes: Any) -> UNet2DConditionModel:
    config = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (8, 8),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "norm_num_groups": 4,
        "cross_attention_dim": 6,
        "attention_head_dim": 4,
    }
    return UNet2DConditionModel(**{**config, **changes})


def test_labels_go_to_a_class_conditional_model_and_nowhere_else() -> None:
    x, y = images(2), torch.tensor([1, 4])
    assert read_batch(unet(), (x, y))[1] == {}
    assert torch.equal(read_batch(unet(num_class_embeds=10), [x, y])[1]["class_labels"], y)
    assert torch.equal(read_batch(unet(num_class_embeds=10), {"images": x, "label": y})[1]["class_labels"], y)


def test_labels_change_the_loss_of_a_class_conditional_model() -> None:
    torch.manual_seed(0)
    model = unet(num_class_embeds=10).eval()
    x, noise = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    objective = make_objective(model)
    one, other = (objective.loss(model, (x, torch.tensor([k, k])), 5, noise) for k in (1, 2))
    assert not torch.isclose(one, other)


def test_conditioning_reaches_a_text_conditional_model() -> None:
    torch.manual_seed(0)
    model = conditional().eval()
    x, noise, text = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.randn(2, 5, 6)
    objective = make_objective(model)
    batch = {"pixel_values": x, "encoder_hidden_states": text, "file": ["a.png", "b.png"]}
    loss = objective.loss(model, batch, 5, noise, reduction="none")
    noisy = objective.noisy(x, torch.tensor([5, 5]), noise)
    expected = (model(noisy, 5, text).sample - noise).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, expected)


MISSING = {
    "class labels": (lambda: unet(num_class_embeds=10), {}, "class_labels"),
    "text": (conditional, {}, "encoder_hidden_states"),
    "added conditions": (
        lambda: conditional(
            addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=14
        ),
        {"encoder_hidden_states": torch.zeros(2, 5, 6)},
        "added_cond_kwargs",
    ),
    "pooled text of an SD3": (
        lambda: SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=1
        ),
        {"encoder_hidden_states": torch.zeros(2, 5, 6)},
        "pooled_projections",
    ),
    "class labels of a DiT": (
        lambda: DiTTransformer2DModel(
            num_attention_heads=1, attention_head_dim=4, in_channels=4, num_layers=1, sample_size=8
        ),
        {},
        "class_labels",
    ),
}


@pytest.mark.parametrize("case", MISSING.values(), ids=MISSING.keys())
def test_a_missing_conditioning_input_is_named(case: tuple[Any, dict[str, Any], str]) -> None:
    make, given, name = case
    with pytest.raises(ValueError, match=f"needs '{name}'"):
        read_batch(make(), {"images": images(2, channels=4), **given})


def test_a_missing_part_of_the_added_conditions_is_named() -> None:
    given = {"encoder_hidden_states": torch.zeros(2, 5, 6), "added_cond_kwargs": {"text_embeds": torch.zeros(2, 6)}}
    with pytest.raises(ValueError, match=r"needs \['time_ids'\] in added_cond_kwargs"):
        read_batch(MISSING["added conditions"][0](), {"images": images(2, channels=4), **given})


def test_a_forward_that_trips_over_a_missing_input_says_what_it_was_given() -> None:
    class Wants(Answers):
        def forward(self, sample: Tensor, timestep: Tensor, style: Any = None) -> Tensor:
            return sample * style.mean()

    x, noise, t = setup()
    with pytest.raises(ValueError, match=r"Wants\.forward failed: .* if it needs one of \['style'\]"):
        make_objective(Wants()).loss(Wants(), x, t, noise)


def test_flux_is_told_sigma_with_positions_for_all_samples() -> None:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip
    batch = {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 10),
        "img_ids": torch.randn(16, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    objective = make_objective(model, FlowMatchEulerDiscreteScheduler())
    noise = objective.noise(batch, torch.Generator().manual_seed(0))
    loss = objective.loss(model, batch, 499, noise, reduction="none")
    x = 0.5 * batch["hidden_states"] + 0.5 * noise
    output = model(**{**batch, "hidden_states": x, "timestep": torch.tensor([0.5, 0.5])}).sample
    expected = (output - (noise - batch["hidden_states"])).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, expected)


def test_a_model_that_counts_backwards_needs_a_loss_fn() -> None:
    class Lumina2Transformer2DModel(Answers):
        pass

    with pytest.raises(ValueError, match="counts its time backwards"):
        make_objective(Lumina2Transformer2DModel(), FlowMatchEulerDiscreteScheduler())


def test_conditioning_of_another_length_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"4 images, but encoder_hidden_states has 3 rows"):
        read_batch(conditional(), {"images": images(4, channels=4), "encoder_hidden_states": torch.zeros(3, 5, 6)})


def test_batches_that_are_not_understood_are_type_errors() -> None:
    with pytest.raises(TypeError, match="no image tensor: keys"):
        read_batch(unet(), {"text": ["a"]})
    with pytest.raises(TypeError, match="tuples of 3"):
        read_batch(unet(), (images(2), torch.zeros(2), torch.zeros(2)))
    with pytest.raises(TypeError, match="the loader yields str"):
        read_batch(unet(), "images")
