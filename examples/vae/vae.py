"""Prune a small variational autoencoder, in plain PyTorch, by its evidence lower bound.

    python examples/vae/vae.py --out vae            # trains for a minute, prunes, finetunes
    python examples/vae/vae.py --out vae --quick    # a few steps of everything: does it run at all?

Scored through ``loss_fn``, with the loss of its training: squared error of the reconstruction plus the divergence of
the latents from a standard normal. The noise that ``loss_fn`` gets is the latents' noise here; there is no timestep.
Straight after pruning and after a short finetune: both parts of the loss on held-out images.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from comparison import compare
from digits.data import digits, shifted

LATENT, WIDTH = 16, 48
NOISE_LEVEL = 0.3  # of the pixels, as the decoder's normal distribution has it


class VAE(nn.Module):
    """``(batch, 1, 16, 16)`` images and ``(batch, 16)`` noise to the reconstruction, mean and log variance."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(c, WIDTH, 4, stride=2, padding=1) for c in (1, WIDTH))
        self.to_latent = nn.Linear(WIDTH * 16, 2 * LATENT)
        self.from_latent = nn.Linear(LATENT, WIDTH * 16)
        self.up = nn.ModuleList(nn.ConvTranspose2d(WIDTH, WIDTH, 4, stride=2, padding=1) for _ in range(2))
        self.last = nn.Conv2d(WIDTH, 1, 3, padding=1)

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for conv in self.down:
            images = F.silu(conv(images))
        mean, log_variance = self.to_latent(images.flatten(1)).chunk(2, dim=1)
        return self.decode(mean + noise * torch.exp(log_variance / 2)), mean, log_variance

    def decode(self, latents: Tensor) -> Tensor:
        h = F.silu(self.from_latent(latents)).unflatten(1, (-1, 4, 4))
        for conv in self.up:
            h = F.silu(conv(h))
        return torch.tanh(self.last(h))


def parts(model: nn.Module, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Reconstruction and divergence of each image, in nats up to a constant."""
    decoded, mean, log_variance = model(images, noise)
    error = (decoded - images).square().flatten(1).sum(1) / (2 * NOISE_LEVEL**2)
    return error, (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2


def bound(model: nn.Module, batch: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    return sum(parts(model, batch, noise.flatten(1)[:, :LATENT]))  # type: ignore[return-value]


def train(model: nn.Module, images: Tensor, *, steps: int, lr: float, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        batch = shifted(images[torch.randint(0, len(images), (64,))])
        loss = sum(parts(model, batch, torch.randn(64, LATENT)))
        optimizer.zero_grad()
        loss.mean().backward()  # type: ignore[union-attr]
        optimizer.step()


def main(out: Path, quick: bool) -> None:
    data, held_out = digits()
    torch.manual_seed(0)
    model = VAE()
    train(model, data.images, steps=5 if quick else 1500, lr=2e-3, seed=0)
    generator = torch.Generator().manual_seed(1)
    noise, latents = (torch.randn(n, LATENT, generator=generator) for n in (len(held_out), 10))
    by_loss = {"loss_fn": bound, "timesteps": [0]}

    def shown(model: nn.Module) -> Tensor:
        """Ten held-out images as the model gives them back, and ten from latents drawn at random."""
        return torch.cat([model(held_out.images[:10], 0 * noise[:10])[0], model.decode(latents)])

    def measured(model: nn.Module) -> tuple[str, ...]:
        error, divergence = (x.mean() for x in parts(model, held_out.images, noise))
        return f"{error:.1f}", f"{divergence:.1f}"

    compare(
        model,
        data.images.split(64),
        {"its loss": {}, "magnitude": {"criterion": "magnitude"}, "random": {"criterion": "random"}},
        measures=("error", "divergence"),
        measured=measured,
        shown=shown,
        recover=partial(train, images=data.images, steps=2 if quick else 200, lr=1e-3, seed=1),
        out=out,
        title="a variational autoencoder, on held-out digits",
        macs=0.5,
        **by_loss,
        example_inputs=(data.images[:1], noise[:1]),
        max_samples=64 if quick else 1024,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("vae"), help="where the pictures go")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything; the figures mean nothing")
    arguments = parser.parse_args()
    main(arguments.out, arguments.quick)
