"""Prune a real diffusion model to half its MACs, finetune it for a minute, and show what that cost.

    python examples/digits/demo.py --out demo            # what `make demo` runs
    python examples/digits/demo.py --out demo --quick    # a few steps of everything: does it run at all?

Three criteria prune the same model to the same budget and get the same finetune: Diff-Pruning, magnitude and random.
``--out`` gets the pruned and finetuned checkpoint, the pictures and ``report.html``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from data import SIZE, Digits, digits, shifted
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.utils import logging
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diffprune_fast import PruneResult, score_and_prune
from diffprune_fast.evaluation.loss import diffusion_loss
from diffprune_fast.evaluation.sampling import sample
from diffprune_fast.evaluation.similarity import ssim
from diffprune_fast.evaluation.timing import seconds_per_image
from diffprune_fast.recovery.finetune import finetune
from diffprune_fast.report.figures import kept_channels, loss_curve, sample_grids
from diffprune_fast.report.page import write_report
from diffprune_fast.report.table import Measured, print_table

HERE = Path(__file__).parent
CRITERIA = {"diff-pruning": "Diff-Pruning", "magnitude": "magnitude", "random": "random"}


@dataclass(frozen=True)
class Setting:
    """How much of everything the demo does."""

    macs: float = 0.5
    finetune_steps: int = 200
    finetune_batch: int = 64
    # The model was trained with 1e-3; 1e-3 again, falling to nothing, recovers most in few steps.
    lr: float = 1e-3
    sampling_steps: int = 50
    samples: int = 64
    shown: int = 40
    repeats: int = 3
    passes: int = 4
    max_samples: int = 2048
    seed: int = 0


QUICK = Setting(finetune_steps=5, sampling_steps=5, samples=8, shown=8, repeats=1, passes=1, max_samples=512)


def loader_of(images: Tensor, batch: int, seed: int) -> Iterable[Tensor]:
    """Batches of the training images as the model was trained on them: shuffled and shifted anew in every pass."""
    generator = torch.Generator().manual_seed(seed)

    def collate(chosen: list[Tensor]) -> Tensor:
        return shifted(torch.stack(chosen), generator=generator)

    return DataLoader(images, batch_size=batch, shuffle=True, drop_last=True, generator=generator, collate_fn=collate)


class Evaluation:
    """Measures every model in the same way: the original's samples, the noise and the held-out images are fixed."""

    def __init__(self, original: nn.Module, scheduler: DDPMScheduler, held_out: Digits, setting: Setting) -> None:
        self.scheduler, self.held_out, self.setting = scheduler, held_out, setting
        self.noise = torch.randn(setting.samples, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(setting.seed))
        self.reference = self.samples(original)

    def samples(self, model: nn.Module) -> Tensor:
        return sample(model, self.scheduler, self.noise, steps=self.setting.sampling_steps)

    def loss(self, model: nn.Module) -> float:
        return diffusion_loss(model, self.held_out.images, self.scheduler, passes=self.setting.passes)

    def seconds(self, models: list[nn.Module]) -> list[float]:
        """Per image: the median of several rounds in which the models take turns, so that all meet the same load."""
        noise, steps = self.noise[:16], self.setting.sampling_steps
        rounds = [
            [seconds_per_image(model, self.scheduler, noise, steps=steps, repeats=1) for model in models]
            for _ in range(self.setting.repeats)
        ]
        return [statistics.median(of_model) for of_model in zip(*rounds, strict=True)]


@dataclass(frozen=True)
class Outcome:
    """One criterion's pruned model, and what it makes before and after finetuning."""

    result: PruneResult
    row: Measured
    pruned: Tensor
    finetuned: Tensor


def prune_and_recover(
    original: UNet2DModel, criterion: str, images: Tensor, evaluation: Evaluation, setting: Setting
) -> Outcome:
    """Prune a copy of the original by ``criterion``, measure, finetune, measure again."""
    result = score_and_prune(
        original,
        loader_of(images, 64, setting.seed),
        scheduler=evaluation.scheduler,
        macs=setting.macs,
        ranking="global",
        criterion=criterion,
        max_samples=setting.max_samples,
        inplace=False,
        seed=setting.seed,
    )
    model = result.model
    pruned, loss = evaluation.samples(model), evaluation.loss(model)
    training = loader_of(images, setting.finetune_batch, setting.seed)
    finetune(model, training, evaluation.scheduler, steps=setting.finetune_steps, lr=setting.lr, seed=setting.seed)
    finetuned = evaluation.samples(model)
    row = Measured(
        name=CRITERIA[criterion],
        params=result.after.params,
        macs=result.after.macs,
        seconds_per_image=None,
        loss=loss,
        loss_finetuned=evaluation.loss(model),
        ssim=ssim(pruned, evaluation.reference),
        ssim_finetuned=ssim(finetuned, evaluation.reference),
    )
    return Outcome(result, row, pruned, finetuned)


def run(out: Path, setting: Setting, console: Console) -> Path:
    """The whole demo; returns where the report is."""
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    train, held_out = digits()
    original = UNet2DModel.from_pretrained(HERE / "model", torch_dtype=torch.float32)
    scheduler = DDPMScheduler.from_pretrained(HERE / "model")
    evaluation = Evaluation(original, scheduler, held_out, setting)
    outcomes = {}
    for criterion, name in CRITERIA.items():
        console.rule(f"pruning by {name}", align="left")
        outcomes[criterion] = prune_and_recover(original, criterion, train.images, evaluation, setting)
        console.print(str(outcomes[criterion].result), highlight=False)
    ours = outcomes["diff-pruning"]
    before = ours.result.before
    rows = [
        Measured("original", before.params, before.macs, None, evaluation.loss(original), ssim=1.0),
        *(outcome.row for outcome in outcomes.values()),
    ]
    seconds = evaluation.seconds([original, *(outcome.result.model for outcome in outcomes.values())])
    rows = [replace(row, seconds_per_image=s) for row, s in zip(rows, seconds, strict=True)]
    ours.result.save_pretrained(out / "pruned")
    report = write_pages(out, rows, evaluation, ours, setting, seconds=time.perf_counter() - start)
    console.rule("digits, pruned to half the MACs", align="left")
    print_table(rows)
    console.print(f"{time.perf_counter() - start:.0f} s in all. The pruned model is in {out / 'pruned'}.")
    console.print(f"The report: {report}")
    return report


def write_pages(
    out: Path, rows: list[Measured], evaluation: Evaluation, ours: Outcome, setting: Setting, *, seconds: float
) -> Path:
    """The pictures as files, and the page that shows them."""
    result, shown = ours.result, slice(setting.shown)
    grids = {
        "original": evaluation.reference[shown],
        "pruned": ours.pruned[shown],
        "pruned and finetuned": ours.finetuned[shown],
    }
    figures = {
        "Samples": (
            sample_grids(grids),
            f"The same noise, {setting.sampling_steps} DDIM steps, no picking. Left: the original. Middle: straight "
            f"after pruning. Right: after {setting.finetune_steps} finetuning steps.",
        ),
        "Kept channels": (
            kept_channels(result.plan, result.keep),
            "Channels that must be removed together form a group; each bar is one group and how much of it stays.",
        ),
    }
    names = {"Samples": "samples.png", "Kept channels": "kept_channels.png", "Which timesteps count": "loss_curve.png"}
    if result.scores is not None and result.scores.curve is not None:
        figures["Which timesteps count"] = (
            loss_curve(result.scores.curve),
            "Channels are scored at the timesteps whose loss is above the threshold (Diff-Pruning, section 4.2).",
        )
    for heading, (figure, _) in figures.items():
        figure.savefig(out / names[heading])
    return write_report(
        out / "report.html",
        rows,
        figures,
        title="A digits diffusion model at half the MACs",
        summary=(
            "A small DDPM, trained on scikit-learn's handwritten digits at 16×16, was pruned by three criteria to the "
            "same budget and finetuned in the same way. Loss: the training loss on images that were never trained on. "
            "SSIM: likeness to the original's samples from the same noise."
        ),
        result=result,
        notes={
            "finetuning": f"{setting.finetune_steps} steps of {setting.finetune_batch} images, Adam, lr {setting.lr:g}",
            "whole demo": f"{seconds:.0f} s",
        },
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where the checkpoint, pictures and page go")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything; the figures mean nothing")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    run(arguments.out, QUICK if arguments.quick else Setting(), Console())
