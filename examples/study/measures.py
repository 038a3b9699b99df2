"""What the study measures of every model, in the same way: loss, likeness to the dense model, Fréchet distance."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from data import Patches
from digits.classifier import Features
from models import CLASSES, Loader, Subject
from torch import Tensor, nn

from diffprune_fast.evaluation import diffusion_loss, sample, ssim


@dataclass(frozen=True)
class Amounts:
    """How much of everything the study does.

    trained_steps: steps of a training after pruning. lr: of distillation. finetune_lr: of ordinary finetuning from
    the sliced model. batch: of loaders; None is the subject's own. scored: samples that scores rest on, at most.
    samples: images sampled of every model, by so many DDIM sampling_steps. own_samples: images that the dense model
    makes in place of the data. probes: images on which a single cluster's damage is measured. reference_batch: images
    of the reference's one batch. held_out: of the held-out images, at most. clusters: probed, at most.
    """

    trained_steps: int = 200
    lr: float = 2e-4
    finetune_lr: float = 1e-3
    batch: int | None = None
    scored: int = 2048
    samples: int = 256
    sampling_steps: int = 25
    own_samples: int = 512
    probes: int = 128
    reference_batch: int = 32
    held_out: int = 1000
    classifier_steps: int = 600
    clusters: int | None = None


QUICK = Amounts(
    trained_steps=2,
    batch=4,
    scored=16,
    samples=12,
    sampling_steps=2,
    own_samples=16,
    probes=8,
    reference_batch=2,
    held_out=16,
    classifier_steps=20,
    clusters=2,
)


def as_they_are(images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Samples of a model that learned the augmentation have it in them."""
    return images


def _labels(n: int) -> Tensor:
    return torch.arange(n) % CLASSES


class Bench:
    """One subject's dense model, its data, and the figures that are taken of a model.

    The held-out images, the noise and the dense model's samples are the same for every model: differences are paired.
    """

    def __init__(self, subject: Subject, amounts: Amounts) -> None:
        self.subject, self.amounts = subject, amounts
        self.dense, self.scheduler = subject.load()
        self.train, self.held_out = subject.data()

    def loader(self, seed: int, *, batch: int | None = None, own: bool = False) -> Loader:
        """The training images, or ``own`` ones: those that the dense model makes."""
        subject = dataclasses.replace(self.subject, augmented=as_they_are) if own else self.subject
        return Loader(
            subject, self._own if own else self.train, batch or self.amounts.batch or self.subject.batch, seed
        )

    def loss(self, model: nn.Module) -> float:
        """The training loss on held-out images."""
        n = self.amounts.held_out
        batch = self.subject.batch_of(self.held_out.images[:n], self.held_out.labels[:n])
        return diffusion_loss(model, batch, self.scheduler, passes=self.subject.passes)

    def likeness(self, model: nn.Module) -> dict[str, float]:
        """SSIM to the dense model's samples from the same noise, and the samples' Fréchet distance to real images."""
        images = self._samples(model)
        return {"ssim": ssim(images, self._dense_samples), "frechet": self.features.frechet(images)}

    @torch.no_grad()
    def damage(self, model: nn.Module) -> float:
        """Mean squared difference of its output to the dense model's, on noisy images to train on."""
        images, t, inputs = self._probes
        return float((model(images, t, **inputs).sample - self._probe_outputs).square().mean())

    @cached_property
    def features(self) -> Features:
        return Features(self.train, self.held_out, self.subject.augmented, steps=self.amounts.classifier_steps)

    def _samples(self, model: nn.Module) -> Tensor:
        return self._made(model, _labels(self.amounts.samples), seed=0)

    def _made(self, model: nn.Module, labels: Tensor, seed: int) -> Tensor:
        shape = (len(labels), *self.train.images.shape[1:])
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        conditioning: Mapping[str, Any] = self.subject.condition(labels)
        return sample(model, self.scheduler, noise, steps=self.amounts.sampling_steps, **conditioning)

    @cached_property
    def _own(self) -> Patches:
        labels = _labels(self.amounts.own_samples)
        return Patches(self._made(self.dense, labels, seed=4), labels)

    @cached_property
    def _dense_samples(self) -> Tensor:
        return self._samples(self.dense)

    @cached_property
    def _probes(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        n, generator = self.amounts.probes, torch.Generator().manual_seed(3)
        chosen = torch.randint(0, len(self.train), (n,), generator=generator)
        images = self.train.images[chosen]
        strips = (torch.arange(n) + torch.rand(n, generator=generator)) / n
        t = (strips * len(self.scheduler)).long()
        noisy = self.scheduler.add_noise(images, torch.randn(images.shape, generator=generator), t)
        return noisy, t, self.subject.condition(self.train.labels[chosen])

    @cached_property
    @torch.no_grad()
    def _probe_outputs(self) -> Tensor:
        images, t, inputs = self._probes
        return self.dense(images, t, **inputs).sample
