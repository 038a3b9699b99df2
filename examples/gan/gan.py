"""Prune the generator of a small GAN, in plain PyTorch, by its own adversarial loss.

    python examples/gan/gan.py --out gan            # trains for a minute, prunes, finetunes
    python examples/gan/gan.py --out gan --quick    # a few steps of everything: does it run at all?

The generator is scored through ``loss_fn``, whose batch is latents and labels, in two ways. "adversarial": the loss
that it was trained with, against its discriminator. "sensitivity": its images, weighted by random numbers; the
gradients say how much the images change. (The distance to the unpruned generator's own images can't be used: it is zero
there, and so are its gradients.) Straight after pruning and after a short adversarial finetune: how many of the
generated digits a classifier reads as asked, and the Fréchet distance of its features to those of held-out images.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

sys.path.insert(0, str(Path(__file__).parents[1]))
from comparison import compare
from digits.data import Digits, digits
from digits.reader import Reader

LATENT, CLASSES, WIDTH = 32, 10, 48


class Generator(nn.Module):
    """``(batch, 32)`` latents and ``(batch, 10)`` one-hot labels to ``(batch, 1, 16, 16)`` images in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(LATENT + CLASSES, WIDTH * 16)
        self.convs = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(WIDTH) for _ in range(4))
        self.last = nn.Conv2d(WIDTH, 1, 3, padding=1)

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        h = self.first(torch.cat([latents, labels], dim=1)).unflatten(1, (-1, 4, 4))
        h = F.relu(self.norms[0](h))
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms[1:])):
            h = F.relu(norm(conv(F.interpolate(h, scale_factor=2) if i < 2 else h)))
        return torch.tanh(self.last(h))


class Discriminator(nn.Module):
    """A logit for each image with its label (projection: Miyato and Koyama, 2018)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 24, 48, 48)
        convs = (nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in pairwise(widths))
        self.convs = nn.ModuleList(spectral_norm(conv) for conv in convs)
        self.out = spectral_norm(nn.Linear(48 * 4, 1))
        self.of_label = spectral_norm(nn.Linear(CLASSES, 48 * 4, bias=False))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        for conv in self.convs:
            images = F.leaky_relu(conv(images), 0.2)
        h = images.flatten(1)
        return self.out(h)[:, 0] + (h * self.of_label(labels)).sum(1)


class Latents:
    """Fresh latents with labels in every batch, the same in every pass."""

    def __init__(self, batch: int, batches: int, seed: int) -> None:
        self.batch, self.batches, self.seed = batch, batches, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.batches):
            labels = torch.randint(0, CLASSES, (self.batch,), generator=generator)
            yield torch.randn(self.batch, LATENT, generator=generator), F.one_hot(labels, CLASSES).float()


def train(made: Generator, judge: Discriminator, data: Digits, *, steps: int, lr: float, seed: int) -> None:
    """Hinge loss for the discriminator, ``-D(G(z))`` for the generator, in turns."""
    torch.manual_seed(seed)
    optimizers = [torch.optim.Adam(m.parameters(), lr=lr, betas=(0.0, 0.99)) for m in (made, judge)]
    made.train(), judge.train()
    for step, (latents, labels) in enumerate(Latents(32, steps, seed)):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, 2 * (1 - step / steps))
        chosen = torch.randint(0, len(data), (32,))
        real, of_real = data.images[chosen], F.one_hot(data.labels[chosen], CLASSES).float()
        fake = made(latents, labels)
        loss = F.relu(1 - judge(real, of_real)).mean() + F.relu(1 + judge(fake.detach(), labels)).mean()
        step_of(optimizers[1], loss)
        step_of(optimizers[0], -judge(fake, labels).mean())
    made.eval(), judge.eval()


def step_of(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def trained(data: Digits, *, steps: int, seed: int) -> tuple[Generator, Discriminator]:
    torch.manual_seed(seed)
    made, judge = Generator(), Discriminator()
    train(made, judge, data, steps=steps, lr=1e-3, seed=seed)
    return made, judge


def ways_to_score(judge: nn.Module) -> dict[str, dict[str, Any]]:
    """Options of ``score_and_prune``; there are no timesteps, and the losses have no threshold."""

    def adversarial(model: nn.Module, batch: tuple[Tensor, Tensor], t: Tensor, noise: Tensor) -> Tensor:
        return -judge(model(*batch), batch[1])

    def sensitivity(model: nn.Module, batch: tuple[Tensor, Tensor], t: Tensor, noise: Tensor) -> Tensor:
        images = model(*batch)
        return (images * torch.randn_like(images)).flatten(1).mean(1)

    # Where the criterion needs no loss, the allocation and the compensation still run the model by it.
    by_loss = {"loss_fn": adversarial, "timesteps": [0]}
    return {
        "adversarial": by_loss,
        "sensitivity": {"loss_fn": sensitivity, "timesteps": [0]},
        "magnitude": {"criterion": "magnitude", **by_loss},
        "random": {"criterion": "random", **by_loss},
    }


def main(out: Path, quick: bool) -> None:
    data, held_out = digits()
    generator, judge = trained(data, steps=5 if quick else 1200, seed=0)
    reader = Reader(data, steps=5 if quick else 400)
    latents, labels = next(iter(Latents(1000, 1, 1)))
    asked = torch.eye(CLASSES).repeat(2, 1)

    def measured(model: nn.Module) -> tuple[str, ...]:
        right, distance = reader(model(latents, labels), labels.argmax(1), held_out.images)
        return f"{right:.1%}", f"{distance:.1f}"

    compare(
        generator,
        Latents(32, 2 if quick else 32, 2),
        ways_to_score(judge),
        measures=("as asked", "distance"),
        measured=measured,
        shown=lambda model: model(latents[:20], asked),
        recover=lambda model: train(model, copy.deepcopy(judge), data, steps=2 if quick else 100, lr=5e-4, seed=1),
        out=out,
        title="the generator of a GAN",
        macs=0.5,
        example_inputs=(latents[:1], labels[:1]),
        max_samples=64 if quick else 1024,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gan"), help="where the pictures go")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything; the figures mean nothing")
    arguments = parser.parse_args()
    main(arguments.out, arguments.quick)
