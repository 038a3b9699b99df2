"""Batches for a model without images: it makes them itself."""

from __future__ import annotations

import itertools
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..objective.checks import in_channels
from ..objective.conditioning import config_of, is_autoencoder, read_batch, wants_labels
from ..objective.loss import DEFAULT_TIMESTEPS, dtype_of, make_objective
from ..objective.randomness import generator_for
from ..progress import bar
from .sampling import sample

# The place of these samples in the seed's tree.
OWN_SAMPLES = 23


class MadeBatches(ABC):
    """Batches that are made when they are first asked for, kept on the host, and the same ones every time after.

    model: makes them; as it was given, so once its weights have other shapes no further batch is made. n: samples in
    all. batch: samples of each. steps: denoising steps. progress: say before the first one how long all will take.
    """

    def __init__(self, model: nn.Module, *, n: int, batch: int, steps: int, seed: int, progress: bool) -> None:
        for name, value in (("n", n), ("batch", batch), ("steps", steps)):
            if value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")
        self.n, self.batch, self.steps, self.seed = n, batch, steps, seed
        self._model, self._progress = model, progress
        self._shapes = _shapes(model)
        self._made: dict[int, Any] = {}

    def __len__(self) -> int:
        return -(-self.n // self.batch)

    def __iter__(self) -> Iterator[Any]:
        return map(self._get, range(len(self)))

    def estimate(self) -> float:
        """Seconds that all batches take, from a few denoising steps of one; nothing of that is kept."""
        size = min(self.n, self.batch)
        self._make(0, size, 2)  # the first call may compile, or choose its kernels
        two, four = self._seconds(size, 2), self._seconds(size, 4)
        a_step = max(four - two, 0) / 2
        return (two + (self.steps - 2) * a_step) * self.n / size

    def make_all(self) -> None:
        """Make every batch now, for instance before the model is pruned."""
        for _ in bar(self, desc="sampling", show=self._progress, unit="batch"):
            pass

    @abstractmethod
    def _make(self, index: int, size: int, steps: int) -> Any:
        """The batch of that place, of ``size`` samples, as it is kept."""

    def _given(self, kept: Any) -> Any:
        """A kept batch as it is handed out."""
        return kept

    def _get(self, index: int) -> Any:
        if index not in self._made:
            if _shapes(self._model) != self._shapes:
                raise ValueError(
                    f"the {type(self._model).__name__} was pruned since: its samples would be another model's. Call "
                    "make_all() before, or give a loader"
                )
            if self._progress and not self._made:
                print(f"sampling {self.n} images takes about {self.estimate():.0f} s", file=sys.stderr)
            self._made[index] = self._make(index, min(self.batch, self.n - index * self.batch), self.steps)
        return self._given(self._made[index])

    def _seconds(self, size: int, steps: int) -> float:
        start = time.perf_counter()
        self._make(0, size, steps)  # ends on the host, so the device has nothing left to do
        return time.perf_counter() - start


class OwnSamples(MadeBatches):
    """A loader of images that ``model`` makes of noise, by 25 steps of DDIM: ``(batch, channels, height, width)``, or
    ``(images, labels)`` with labels drawn uniformly where the model has classes.

    They serve scoring and compensation as well as data do; a finetune towards them learns what the model knows already.

    scheduler: the one of the training; None is ``DDPMScheduler()``. shape: channels, height and width of an image; None
    asks the model's config. Images are cut to the range that the scheduler clips to, if it does.

    Raises ValueError for a model that makes nothing of noise alone: an autoencoder, or one told more than a class.

    Example:
        >>> from diffusers import UNet2DModel
        >>> unet = UNet2DModel(8, block_out_channels=(8, 16), down_block_types=("DownBlock2D",) * 2,
        ...                    up_block_types=("UpBlock2D",) * 2, norm_num_groups=4)
        >>> [batch.shape for batch in OwnSamples(unet, n=6, batch=4, steps=2)]
        [torch.Size([4, 3, 8, 8]), torch.Size([2, 3, 8, 8])]
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: Any = None,
        *,
        n: int = 512,
        steps: int = 25,
        batch: int = 64,
        shape: tuple[int, ...] | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        super().__init__(model, n=n, batch=batch, steps=steps, seed=seed, progress=progress)
        if is_autoencoder(model):
            raise ValueError(f"{type(model).__name__} is an autoencoder, it makes no images of noise: give a loader")
        make_objective(model, scheduler)  # raises where it isn't known what the model predicts
        from diffusers import DDPMScheduler

        self._scheduler = scheduler or DDPMScheduler(num_train_timesteps=DEFAULT_TIMESTEPS)
        self._shape = shape or _image_shape(model)
        self._classes = n_classes(model)
        labels = () if self._classes is None else (torch.zeros(1, dtype=torch.long),)
        try:
            read_batch(model, (torch.zeros(1, *self._shape), *labels))
        except ValueError as error:
            raise ValueError(
                f"{type(model).__name__} can't be sampled from noise alone: {error}. Give the pipeline and prompts "
                "(score_and_prune(pipe, prompts)), or a loader that has it"
            ) from error

    def _make(self, index: int, size: int, steps: int) -> Any:
        generator = generator_for(self.seed, OWN_SAMPLES, index)
        noise = torch.randn(size, *self._shape, generator=generator)
        labels = None if self._classes is None else torch.randint(self._classes, (size,), generator=generator)
        device = next(self._model.parameters()).device
        images = sample(
            self._model,
            self._scheduler,
            noise.to(device, dtype_of(self._model)),
            steps=steps,
            labels=labels if labels is None else labels.to(device),
            clamp=_range_of(self._scheduler),
        )
        images = images.to("cpu", torch.float64 if images.dtype == torch.float64 else torch.float32)
        return images if labels is None else (images, labels)


def n_classes(model: nn.Module) -> int | None:
    """How many classes ``model`` knows, None where it is told none.

    Raises ValueError where its classes are no numbers, or it doesn't say how many there are.
    """
    if not wants_labels(model):
        return None
    config = config_of(model)
    count = config.get("num_class_embeds") or config.get("num_embeds_ada_norm")
    if not isinstance(count, int) or config.get("class_embed_type") is not None:
        raise ValueError(
            f"{type(model).__name__} is told classes, but its config doesn't say how many there are: give a loader of "
            "(images, labels)"
        )
    return count


def _image_shape(model: nn.Module) -> tuple[int, ...]:
    size, channels = config_of(model).get("sample_size"), in_channels(model)
    if size is None or channels is None:
        raise ValueError(
            f"{type(model).__name__} doesn't say how large its images are (config.in_channels and sample_size): give a "
            "loader, or OwnSamples(model, shape=(channels, height, width))"
        )
    return (channels, size, size) if isinstance(size, int) else (channels, *size)


def _range_of(scheduler: Any) -> float | None:
    """The largest value that the scheduler lets an image have, None for any: latents have no bounds."""
    config = config_of(scheduler)
    return float(config.get("clip_sample_range") or 1.0) if config.get("clip_sample") else None


def _shapes(model: nn.Module) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(t.shape) for t in itertools.chain(model.parameters(), model.buffers()))
