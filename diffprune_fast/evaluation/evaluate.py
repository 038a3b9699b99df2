"""Everything that is measured of one model, over several seeds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..objective.loss import images_of
from ..tracing.trace import trace
from .cost import Forward, forward_costs
from .distances import (
    NEIGHBOURS,
    Extractor,
    Reference,
    extracted,
    frechet_distance,
    kernel_distance,
    precision_and_recall,
)
from .loss import diffusion_loss, loss_by_timestep
from .pretrained import Scorer
from .similarity import WINDOW, ssim

# Images from a seed, ``(n, channels, height, width)`` in [-1, 1].
Sampler = Callable[[int], Tensor]


@dataclass(frozen=True)
class Figure:
    """mean, and standard deviation over ``n`` seeds; None for one."""

    mean: float
    deviation: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.4g}" + ("" if self.deviation is None else f" ± {self.deviation:.2g}") + f" (n={self.n})"


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a model.

    figures: by name, over the seeds: ``"loss"``, and of samples ``"SSIM"`` and ``"MSE"`` to the dense model's,
    ``"Fréchet distance"``, ``"kernel distance"``, ``"precision"`` and ``"recall"`` to the reference, and
    ``"s/image"``. by_timestep: the first timestep of each tenth and
    the loss there, of the first seed. samples: how many a seed.
    """

    params: int
    macs: int
    figures: dict[str, Figure]
    by_timestep: list[tuple[int, float]]
    forwards: list[Forward]
    samples: int

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"params: {self.params:,}", f"MACs: {self.macs:,}"]
        lines += [f"{name}: {figure}" for name, figure in self.figures.items()]
        for f in self.forwards:
            memory = "" if f.peak_bytes is None else f", {f.peak_bytes / 2**20:.0f} MiB at most"
            lines.append(f"forward of {f.batch_size}: {1e3 * f.seconds:.3g} ms{memory}")
        return "\n".join(lines)


def evaluate(
    model: nn.Module,
    held_out: Any,
    scheduler: Any = None,
    *,
    samples: Sampler | None = None,
    dense_samples: Sampler | None = None,
    extractor: Extractor | None = None,
    reference: Reference | None = None,
    more: Mapping[str, Scorer] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    batch_sizes: Sequence[int] = (1, 8),
    example_inputs: Any = None,
) -> Evaluation:
    """Measure what ``model`` costs and what it is worth.

    Args:
        model: a denoiser or an autoencoder.
        held_out: a batch of images, as a loader would yield it, for the loss and the time of a forward.
        scheduler: the one of the training; None is ``DDPMScheduler()``.
        samples: from a seed to images in [-1, 1]; None measures no samples.
        dense_samples: the same of the dense model: at the same seed, from the same noise.
        extractor: from images to features, with ``reference``: see
            :func:`~diffprune_fast.evaluation.distances.find_extractor`.
        reference: the features of images that the samples should be like.
        more: further figures of samples by name, such as those of :mod:`diffprune_fast.evaluation.pretrained`.
        seeds: each gives a loss and a set of samples; more than one give a deviation.
        batch_sizes: at which a forward is timed.
        example_inputs: as for :func:`diffprune_fast.trace`.

    Returns:
        Every figure with its mean, deviation and number of seeds.

    Raises:
        ValueError: there is no seed, or what was given doesn't fit together.
        FloatingPointError: a figure isn't finite.

    Example:
        >>> from diffusers import UNet2DModel
        >>> unet = UNet2DModel(8, block_out_channels=(8,), down_block_types=("DownBlock2D",),
        ...                    up_block_types=("UpBlock2D",), norm_num_groups=4)
        >>> found = evaluate(unet, torch.rand(4, 3, 8, 8) * 2 - 1, seeds=(0, 1))
        >>> found.figures["loss"].n
        2
    """
    if not seeds:
        raise ValueError("there is no seed: give at least one")
    if (extractor is None) != (reference is None):
        raise ValueError("distances of features need both, an extractor and a reference")
    cost = trace(model, example_inputs).complexity()
    found: dict[str, list[float]] = {"loss": [diffusion_loss(model, held_out, scheduler, seed=s) for s in seeds]}
    n = 0
    for seed in seeds if samples is not None else ():
        assert samples is not None
        start = time.perf_counter()
        images = samples(seed)
        n = len(images)
        found.setdefault("s/image", []).append((time.perf_counter() - start) / n)
        expected = None if dense_samples is None else dense_samples(seed).to(images.device)
        ours = None if extractor is None else extracted(extractor, images)
        for name, value in _of_samples(images, expected, ours, reference, more or {}).items():
            found.setdefault(name, []).append(value)
    if len(found.get("s/image", ())) > 1:
        del found["s/image"][0]  # it warmed up
    return Evaluation(
        params=cost.params,
        macs=cost.macs,
        figures={name: summary(values) for name, values in found.items()},
        by_timestep=loss_by_timestep(model, held_out, scheduler, seed=seeds[0]),
        forwards=forward_costs(model, held_out, scheduler, batch_sizes=batch_sizes),
        samples=n,
    )


def _of_samples(
    images: Tensor,
    expected: Tensor | None,
    ours: Reference | None,
    reference: Reference | None,
    more: Mapping[str, Scorer],
) -> dict[str, float]:
    """The figures of one seed's samples."""
    found: dict[str, float] = {}
    if expected is not None:
        if min(images.shape[-2:]) >= WINDOW:
            found["SSIM"] = ssim(images, expected)
        found["MSE"] = float((images - expected).float().square().mean())
    if ours is not None and reference is not None:
        found["Fréchet distance"] = frechet_distance(ours, reference)
        found["kernel distance"] = kernel_distance(ours, reference)
        if min(len(ours.features), len(reference.features)) >= NEIGHBOURS + 2:
            found["precision"], found["recall"] = precision_and_recall(ours, reference)
    return found | {name: scorer(images, expected) for name, scorer in more.items()}


def summary(values: Sequence[float]) -> Figure:
    """Mean and standard deviation (of a sample) of ``values``."""
    return Figure(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def noise_like(held_out: Any, n: int, seed: int) -> Tensor:
    """``(n, channels, height, width)`` noise of the shape of a batch's images that depends on ``seed`` alone."""
    shape = images_of(held_out).shape[1:]
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))
