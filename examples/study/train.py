"""Train the study's models: minutes each, on one CPU core.

    python examples/study/train.py photos --minutes 12
    python examples/study/train.py dit --minutes 12
    python examples/study/train.py crossattn --minutes 9

Writes what ``examples/digits/train.py`` writes, to ``examples/study/models/<name>``; stopped half-way, the next call
goes on from the last checkpoint. Cosine noise schedule (Nichol and Dhariwal, 2021).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from models import SUBJECTS, Subject, parameters
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from digits.train import arguments, fit

from diffprune_fast.evaluation import diffusion_loss


def train(subject: Subject, args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    images, held_out = subject.data()
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    model = subject.new()
    sizes = f"{parameters(model):,} parameters, {len(images)} images, {len(held_out)} held out"
    print(f"{subject.name}: {sizes}", flush=True)

    def draw(batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = torch.randint(0, len(images), (batch,))
        return subject.augmented(images.images[chosen]), subject.condition(images.labels[chosen])

    def report(averaged: Any, step: int) -> str:
        batch = subject.batch_of(held_out.images, held_out.labels)
        return f"held out {diffusion_loss(averaged, batch, scheduler, passes=1):.4f}"

    fit(model, scheduler, draw, report, args)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.set_defaults(steps=100_000, minutes=12.0, batch=None)
    parser.add_argument("name", choices=[name for name in SUBJECTS if name != "digits"])
    parser.add_argument("--out", type=Path, help="where the model goes (default: the study's own)")
    parser.add_argument("--work", type=Path, help="where the checkpoint goes (default: beside it, in runs/<name>)")
    options = parser.parse_args()
    subject = SUBJECTS[options.name]
    options.batch = options.batch or subject.batch
    options.out = options.out or subject.weights
    options.work = options.work or Path(__file__).parent / "runs" / options.name
    train(subject, options)
