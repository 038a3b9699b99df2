"""Distances, spacings and figures whose right values are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

from diffprune_fast.evaluation import evaluate, forward_costs, loss_by_timestep, sample
from diffprune_fast.evaluation.distances import Reference, extracted, frechet_distance, kernel_distance
from diffprune_fast.evaluation.quadratic import QuadraticDDIM
from diffprune_fast.evaluation.sampling import sampler


def normal(n: int, mean: float, deviation: float, seed: int = 0, d: int = 4) -> Reference:
    return Reference((mean + deviation * np.random.default_rng(seed).standard_normal((n, d))).astype(np.float32))


def test_the_frechet_distance_of_normals_is_the_formulas():
    found = frechet_distance(normal(200_000, 0.0, 1.0), normal(200_000, 2.0, 3.0, seed=1))
    assert found == pytest.approx(4 * (2.0**2 + (3.0 - 1.0) ** 2), rel=0.02)
    same = normal(100, 0.0, 1.0)
    assert frechet_distance(same, same) == pytest.approx(0, abs=1e-6)


def test_the_frechet_distance_sees_correlations():
    a = np.random.default_rng(0).standard_normal((50_000, 2)).astype(np.float32)
    turned = np.stack([a[:, 0], 0.6 * a[:, 0] + 0.8 * a[:, 1]], 1)
    expected = np.array([[1, 0.6], [0.6, 1]])
    exact = 4 - 2 * np.sqrt(np.linalg.eigvalsh(expected)).sum()
    assert frechet_distance(Reference(a), Reference(turned)) == pytest.approx(exact, rel=0.05)


def test_the_kernel_distance_is_nothing_for_equal_and_large_for_other_distributions():
    near = kernel_distance(normal(800, 0.0, 1.0), normal(800, 0.0, 1.0, seed=1))
    far = kernel_distance(normal(800, 0.0, 1.0), normal(800, 1.0, 1.0, seed=1))
    assert abs(near) < 0.1
    assert far > 3


def test_features_are_saved_and_read_again(tmp_path):
    reference = extracted(lambda x: x.flatten(1), torch.rand(5, 1, 2, 2), batch_size=2)
    reference.save(tmp_path / "r.npz")
    assert np.array_equal(Reference.load(tmp_path / "r.npz").features, reference.features)
    with pytest.raises(ValueError, match="can't be compared"):
        frechet_distance(reference, normal(5, 0, 1, d=3))
    with pytest.raises(ValueError, match="no finite matrix"):
        extracted(lambda x: x, torch.rand(5, 1, 2, 2))


class Knowing(nn.Module):
    """Knows the one image that there is, so every deterministic sampler has to arrive at it."""

    def __init__(self, image: Tensor, scheduler: DDPMScheduler) -> None:
        super().__init__()
        self.image, self.alphas = nn.Parameter(image), scheduler.alphas_cumprod

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        a = self.alphas[timestep].to(sample.dtype).view(-1, 1, 1, 1)
        if self.kind == "sample":
            return self.image.expand_as(sample)
        noise = (sample - a.sqrt() * self.image) / (1 - a).sqrt()
        return noise if self.kind == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * self.image


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_quadratic_ddim_arrives_at_the_image(kind):
    scheduler = DDPMScheduler(prediction_type=kind, clip_sample=False)
    image = torch.rand(1, 4, 4).double() - 0.5
    model = Knowing(image, scheduler)
    model.kind = kind
    noise = torch.randn(2, 1, 4, 4).double()
    found = sample(model, scheduler, noise, steps=7, spacing="quadratic", clamp=None)
    torch.testing.assert_close(found, image.expand(2, 1, 4, 4), atol=1e-6, rtol=0)


def test_quadratic_timesteps_are_the_published_ones():
    found = QuadraticDDIM(DDPMScheduler(), 5).timesteps.tolist()
    assert found == [int(x) for x in np.linspace(0, np.sqrt(800), 5) ** 2][::-1]


def test_one_quadratic_step_is_ddims_step():
    scheduler = DDPMScheduler(clip_sample=True)
    ours = QuadraticDDIM(scheduler, 3)
    theirs = DDIMScheduler.from_config(scheduler.config, set_alpha_to_one=True)
    theirs.set_timesteps(1000)
    x, predicted = torch.randn(2, 1, 4, 4).double(), torch.randn(2, 1, 4, 4).double()
    ours._before = {500: 499}  # DDIM's own step of a thousand
    torch.testing.assert_close(
        ours.step(predicted, torch.tensor(500), x).prev_sample, theirs.step(predicted, 500, x).prev_sample
    )


def test_wrong_names_of_samplers_are_answered_with_near_ones():
    with pytest.raises(ValueError, match=r"did you mean .*EulerDiscrete"):
        sampler(DDPMScheduler(), 3, "Euler")
    with pytest.raises(ValueError, match="is for DDIM"):
        sampler(DDPMScheduler(), 3, "EulerDiscrete", "quadratic")


class Silent(nn.Conv2d):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return 0 * super().forward(sample) + (timestep >= 500).view(-1, 1, 1, 1)


def test_the_loss_is_known_in_every_part_of_the_timesteps():
    parts = loss_by_timestep(Silent(1, 1, 1), torch.zeros(64, 1, 16, 16), strata=4)
    assert [t for t, _ in parts] == [0, 250, 500, 750]
    assert [loss for _, loss in parts] == pytest.approx([1, 1, 2, 2], rel=0.05)


def test_batches_are_cut_or_repeated_to_the_size_that_is_timed():
    seen = []

    def loss(model: nn.Module, batch: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        seen.append(len(batch))
        return model(batch, t).mean()

    found = forward_costs(Silent(1, 1, 1), torch.zeros(3, 1, 4, 4), batch_sizes=(1, 7), repeats=1, loss_fn=loss)
    assert sorted({*seen}) == [1, 7]
    assert [cost.batch_size for cost in found] == [1, 7]


def test_several_seeds_give_a_mean_a_deviation_and_their_number(monkeypatch):
    import sys

    module = sys.modules["diffprune_fast.evaluation.evaluate"]
    monkeypatch.setattr(module, "diffusion_loss", lambda *_, seed: float(seed))
    model = Silent(1, 1, 1)
    arguments = (torch.zeros(1, 1, 16, 16), torch.zeros(1, dtype=torch.long))
    found = evaluate(
        model,
        torch.zeros(4, 1, 16, 16),
        samples=lambda seed: torch.full((4, 1, 16, 16), 0.5),
        dense_samples=lambda seed: torch.zeros(4, 1, 16, 16),
        seeds=(1, 2, 3),
        example_inputs=arguments,
    )
    assert (found.figures["loss"].mean, found.figures["loss"].deviation, found.figures["loss"].n) == (2, 1, 3)
    assert found.figures["MSE"].mean == pytest.approx(0.25)
    assert found.samples == 4
