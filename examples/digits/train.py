"""Train the demo's model: a small DDPM on scikit-learn's digits at 16x16.

    python examples/digits/train.py                      # an hour on two CPU cores
    python examples/digits/train.py --steps 200 --out /tmp/model
    python examples/digits/train.py --from examples/digits/model --lr 3e-4 --minutes 20 --out new --work new/runs

Writes the averaged (EMA) weights in half precision, ``config.json`` and ``scheduler_config.json`` to ``--out``, so that
``UNet2DModel.from_pretrained(out)`` loads them. Stopped half-way, the next call goes on from the last checkpoint in
``--work``; ``--from`` begins a new training (optimizer, learning rate, average) at the weights of an earlier one.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from digits.data import SIZE, Digits, digits, shifted

HERE = Path(__file__).parent


def new_model() -> UNet2DModel:
    """2.5M parameters; six attention heads of 16 dims in the second level and in the middle."""
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(48, 96, 96),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=8,
    )


def noise_loss(
    model: nn.Module, images: Tensor, noise: Tensor, t: Tensor, scheduler: DDPMScheduler, **conditioning: Tensor
) -> Tensor:
    """The DDPM objective (Ho et al., 2020, eq. 14): mean squared error of the predicted noise."""
    noisy = scheduler.add_noise(images, noise, t)
    with torch.autocast("cpu", torch.bfloat16):
        predicted = model(noisy, t, **conditioning).sample
    return F.mse_loss(predicted.float(), noise)


@torch.no_grad()
def held_out_loss(model: UNet2DModel, held_out: Digits, scheduler: DDPMScheduler) -> float:
    """The objective on images that were never trained on; the same timesteps and noise at every call."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(held_out.images.shape, generator=generator)
    t = torch.linspace(0, len(scheduler) - 1, len(held_out)).long()
    return float(noise_loss(model, held_out.images, noise, t, scheduler))


@torch.no_grad()
def sample(model: UNet2DModel, scheduler: DDPMScheduler, n: int, steps: int = 50) -> Tensor:
    """``(n, 1, 16, 16)`` images from one fixed noise, by DDIM."""
    ddim = DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(steps)
    x = torch.randn(n, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    for t in ddim.timesteps:
        x = ddim.step(model(x, t).sample, t, x).prev_sample
    return x


def save_grid(images: Tensor, path: Path, columns: int = 10) -> None:
    """One PNG with all images in rows of ``columns``, enlarged fourfold."""
    from PIL import Image

    rows = [torch.cat(list(row), dim=-1) for row in images[:, 0].split(columns)]
    grid = ((torch.cat(rows).clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    picture = Image.fromarray(255 - grid)
    picture.resize((picture.width * 4, picture.height * 4), Image.Resampling.NEAREST).save(path)


class Budget:
    """How far the training has come: by steps or by wall-clock time, whichever is further."""

    def __init__(self, steps: int, minutes: float, spent: float = 0.0) -> None:
        self.steps, self.seconds, self.start = steps, minutes * 60, time.monotonic() - spent

    @property
    def spent(self) -> float:
        return time.monotonic() - self.start

    def progress(self, step: int) -> float:
        return min(1.0, max(step / self.steps, self.spent / self.seconds))


def learning_rate(step: int, progress: float, peak: float, warmup: int = 200) -> float:
    """A linear warm-up, then half a cosine down to nothing."""
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * progress))


def save_model(ema: EMAModel, model: Any, scheduler: DDPMScheduler, out: Path) -> None:
    """The averaged weights as half-precision safetensors, and both configs."""
    half = type(model).from_config(model.config)
    ema.copy_to(half.parameters())
    half.half().save_pretrained(out)
    scheduler.save_pretrained(out)


def fit(
    model: Any,
    scheduler: DDPMScheduler,
    draw: Callable[[int], tuple[Tensor, dict[str, Tensor]]],
    report: Callable[[nn.Module, int], str],
    args: argparse.Namespace,
) -> None:
    """Train ``model`` until steps or minutes are used up; goes on from the checkpoint in ``args.work``.

    draw: ``args.batch`` -> so many clean images and the model's conditioning inputs. report: what to print about the
    averaged model at a checkpoint, given the step. The global random state decides everything that is drawn.
    """
    averaged = type(model).from_config(model.config).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-4)
    # The decay's ramp, (1 + step) / (10 + step), ends at 0.998: an average over the last 500 steps or so.
    ema = EMAModel(model.parameters(), decay=0.998)
    args.work.mkdir(parents=True, exist_ok=True)
    step, budget, checkpoint = 0, Budget(args.steps, args.minutes), args.work / "state.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        step, budget = state["step"], Budget(args.steps, args.minutes, state["spent"])
    while budget.progress(step) < 1:
        clean, conditioning = draw(args.batch)
        # One timestep from each of `batch` equal strips: the same expectation as uniform draws, with less variance.
        t = ((torch.arange(args.batch) + torch.rand(args.batch)) / args.batch * len(scheduler)).long()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, budget.progress(step), args.lr)
        loss = noise_loss(model, clean, torch.randn(clean.shape), t, scheduler, **conditioning)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        step += 1
        if step % args.every == 0 or budget.progress(step) >= 1:
            ema.copy_to(averaged.parameters())
            words = report(averaged, step)
            print(f"step {step}  {budget.spent / 60:.1f} min  loss {loss.item():.4f}  {words}", flush=True)
            save_model(ema, model, scheduler, args.out)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}
            torch.save({**state, "step": step, "spent": budget.spent}, checkpoint)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    images, held_out = digits()
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    model = UNet2DModel.from_pretrained(args.start, torch_dtype=torch.float32).train() if args.start else new_model()

    def draw(batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        return shifted(images.images[torch.randint(0, len(images), (batch,))]), {}

    def report(averaged: Any, step: int) -> str:
        save_grid(sample(averaged, scheduler, 40), args.work / f"samples-{step:05d}.png")
        return f"held out {held_out_loss(averaged, held_out, scheduler):.4f}"

    fit(model, scheduler, draw, report, args)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every training has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--minutes", type=float, default=65, help="wall-clock limit; the learning rate follows it too")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=250, help="steps between checkpoints")
    return parser


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--from", dest="start", type=Path, help="a model whose weights to begin with")
    parser.add_argument("--out", type=Path, default=HERE / "model", help="where the model goes")
    parser.add_argument("--work", type=Path, default=HERE / "runs", help="where checkpoints and pictures go")
    train(parser.parse_args())
