"""Prune a real diffusion model to half its MACs, and show what that costs before any training and after a little.

    python examples/digits/demo.py --out demo            # what `make demo` runs
    python examples/digits/demo.py --out demo --quick    # a few steps of everything: does it run at all?

Three criteria prune the same model to the same budget with the same allocation: Diff-Pruning, magnitude and random.
Every pruned model is shown as sliced, with its layers solved anew (compensated), and after 200 steps towards the
original's answers (distilled). ``score_and_prune`` does the first two in one call; here they are apart, to look at what
is between.
``--out`` gets the checkpoint as it is before any training, the pictures and ``report.html``.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from classifier import Features
from data import SIZE, Digits, digits, shifted
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.utils import logging
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diffprune_fast import Plan, PruneResult, compensate, score_and_prune, trace
from diffprune_fast.evaluation.loss import diffusion_loss
from diffprune_fast.evaluation.sampling import sample
from diffprune_fast.evaluation.similarity import ssim
from diffprune_fast.evaluation.timing import seconds_per_image
from diffprune_fast.recovery.finetune import finetune
from diffprune_fast.report.figures import kept_channels, loss_curve, sample_grids
from diffprune_fast.report.page import write_report
from diffprune_fast.report.table import Measured, print_table
from diffprune_fast.result import record
from diffprune_fast.rotation import rotate_heads
from diffprune_fast.slicing import dry_run

HERE = Path(__file__).parent
CRITERIA = {"diff-pruning": "Diff-Pruning", "magnitude": "magnitude", "random": "random"}
SUMMARY = (
    "A small DDPM, trained on scikit-learn's handwritten digits at 16×16, was pruned by three criteria to the same "
    "budget. How many channels each group loses was decided in the same way for all three (the default: by the "
    "estimated damage to the model's output); the criterion decides which. Sliced: channels removed, nothing else. "
    "Compensated: the layers that lost inputs are solved anew, without any training. Distilled: from there, steps "
    "towards the original's answers. Loss: the training loss on images that were never trained on. SSIM: likeness "
    "to the original's samples from the same noise. Fréchet distance: of the samples to images to train on, in the "
    "features of a small classifier; it compares the models of this table and nothing else."
)


@dataclass(frozen=True)
class Setting:
    """How much of everything the demo does."""

    macs: float = 0.5
    steps: int = 200
    # Half of what the model was trained with: the whole demo has to end within six minutes on two cores.
    batch: int = 32
    # Of the distillation, and of the original's further steps.
    lr: float = 2e-4
    sampling_steps: int = 25
    samples: int = 128
    shown: int = 24
    repeats: int = 3
    passes: int = 4
    max_samples: int = 2048
    classifier_steps: int = 600
    seed: int = 0


QUICK = Setting(
    steps=3, sampling_steps=3, samples=40, shown=8, repeats=1, passes=1, max_samples=64, classifier_steps=20
)


def loader_of(images: Tensor, batch: int, seed: int) -> Iterable[Tensor]:
    """Batches of the training images as the model was trained on them: shuffled and shifted anew in every pass."""
    generator = torch.Generator().manual_seed(seed)

    def collate(chosen: list[Tensor]) -> Tensor:
        return shifted(torch.stack(chosen), generator=generator)

    return DataLoader(images, batch_size=batch, shuffle=True, drop_last=True, generator=generator, collate_fn=collate)


class Evaluation:
    """Measures every model in the same way: the original's samples, the noise and the held-out images are fixed."""

    def __init__(
        self, original: nn.Module, scheduler: DDPMScheduler, train: Digits, held_out: Digits, setting: Setting
    ) -> None:
        self.scheduler, self.held_out, self.setting = scheduler, held_out, setting
        self.noise = torch.randn(setting.samples, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(setting.seed))
        self.features = Features(train, held_out, shifted, steps=setting.classifier_steps, seed=setting.seed)
        self.reference = self.samples(original)

    def samples(self, model: nn.Module) -> Tensor:
        return sample(model, self.scheduler, self.noise, steps=self.setting.sampling_steps)

    def loss(self, model: nn.Module) -> float:
        return diffusion_loss(model, self.held_out.images, self.scheduler, passes=self.setting.passes)

    def figures(self, model: nn.Module, samples: Tensor) -> dict[str, float]:
        return {
            "loss": self.loss(model),
            "SSIM": ssim(samples, self.reference),
            "Fréchet distance": self.features.frechet(samples),
        }

    def seconds(self, models: list[nn.Module]) -> list[float]:
        """Per image: the median of several rounds in which the models take turns, so that all meet the same load."""
        noise, steps = self.noise[:16], self.setting.sampling_steps
        rounds = [
            [seconds_per_image(model, self.scheduler, noise, steps=steps, repeats=1) for model in models]
            for _ in range(self.setting.repeats)
        ]
        return [statistics.median(of_model) for of_model in zip(*rounds, strict=True)]


@dataclass
class Outcome:
    """One criterion's pruned model: as compensated, what was measured of it and what it makes, stage by stage."""

    name: str
    result: PruneResult
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    samples: dict[str, Tensor] = field(default_factory=dict)

    def look(self, stage: str, model: nn.Module, evaluation: Evaluation) -> None:
        self.samples[stage] = evaluation.samples(model)
        self.stages[stage] = evaluation.figures(model, self.samples[stage])

    @property
    def row(self) -> Measured:
        return Measured(self.name, self.result.after.params, self.result.after.macs, None, self.stages)


class Remembered(nn.Module):
    """A teacher that works out every answer once: all students are asked the same, as their seeds are the same."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher, self._answers = teacher, dict[bytes, Tensor]()

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        question = hashlib.sha256(sample.numpy().tobytes() + timestep.numpy().tobytes()).digest()
        if question not in self._answers:
            self._answers[question] = self.teacher(sample, timestep).sample
        return (self._answers[question],)


class Demo:
    """One dense model, its data, and what is done to it."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.train, self.held_out = digits()
        self.original = UNet2DModel.from_pretrained(HERE / "model", torch_dtype=torch.float32)
        self.scheduler = DDPMScheduler.from_pretrained(HERE / "model")
        self.evaluation = Evaluation(self.original, self.scheduler, self.train, self.held_out, setting)
        # The same function in another basis of the attention heads; all criteria start from it.
        self.dense: nn.Module = copy.deepcopy(self.original)
        self.plan: Plan = trace(self.dense)
        self.rotation = rotate_heads(self.dense, self.plan, self.loader(), scheduler=self.scheduler, seed=setting.seed)
        self.rotation.forget()
        self.teacher = Remembered(self.original)

    def loader(self, batch: int = 64) -> Iterable[Tensor]:
        return loader_of(self.train.images, batch, self.setting.seed)

    def outcome(self, criterion: str) -> Outcome:
        """Prune a copy by ``criterion``; slice, solve and distil it, and look at it in between."""
        setting, evaluation = self.setting, self.evaluation
        sliced = score_and_prune(
            self.dense,
            self.loader(),
            scheduler=self.scheduler,
            plan=self.plan,
            macs=setting.macs,
            criterion=criterion,
            max_samples=setting.max_samples,
            inplace=False,
            rotate=False,
            compensate=False,
            seed=setting.seed,
        )
        model = copy.deepcopy(sliced.model)
        kept = dry_run(self.dense, self.plan, sliced.keep).kept
        solved = compensate(model, self.dense, self.loader(), kept=kept, scheduler=self.scheduler, seed=setting.seed)
        seconds = {**sliced.seconds, "compensate": solved.seconds}
        result = record(replace(sliced, model=model), compensation=solved, rotation=self.rotation, seconds=seconds)
        outcome = Outcome(CRITERIA[criterion], result)
        outcome.look("sliced", sliced.model, evaluation)
        outcome.look("compensated", model, evaluation)
        distilled = copy.deepcopy(model)
        self.trained(distilled, teacher=self.teacher)
        outcome.look("distilled", distilled, evaluation)
        return outcome

    def trained(self, model: nn.Module, *, teacher: nn.Module | None = None) -> None:
        setting = self.setting
        options = {"steps": setting.steps, "lr": setting.lr, "seed": setting.seed}
        finetune(model, self.loader(setting.batch), self.scheduler, teacher=teacher, **options)

    def trained_on(self) -> float:
        """The original's loss after as many ordinary steps as the pruned models get."""
        model = copy.deepcopy(self.original)
        self.trained(model)
        return self.evaluation.loss(model)

    def rows(self, outcomes: list[Outcome]) -> list[Measured]:
        before = outcomes[0].result.before
        figures = self.evaluation.figures(self.original, self.evaluation.reference)
        found = [Measured("original", before.params, before.macs, None, {"": figures}), *(o.row for o in outcomes)]
        seconds = self.evaluation.seconds([self.original, *(outcome.result.model for outcome in outcomes)])
        return [replace(row, seconds_per_image=s) for row, s in zip(found, seconds, strict=True)]


def run(out: Path, setting: Setting, console: Console) -> Path:
    """The whole demo. Returns the path of the report."""
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    demo, outcomes = Demo(setting), []
    for criterion, name in CRITERIA.items():
        console.rule(f"pruning by {name}", align="left")
        outcomes.append(demo.outcome(criterion))
        console.print(str(outcomes[-1].result), highlight=False)
    console.rule("the original, trained on", align="left")
    control = f"its loss is {demo.trained_on():.4f} after {setting.steps} further ordinary steps, lr {setting.lr:g}"
    rows = demo.rows(outcomes)
    outcomes[0].result.save_pretrained(out / "pruned")
    notes = {
        "allocation": "the same for all criteria",
        "samples": f"{setting.samples} of every model, {setting.sampling_steps} DDIM steps",
        "distillation": f"{setting.steps} steps of {setting.batch} images, Adam, lr {setting.lr:g}",
        "the original": control,
        "classifier": f"{100 * demo.evaluation.features.accuracy:.1f}% of the held-out digits read right",
        "whole demo": f"{time.perf_counter() - start:.0f} s",
    }
    report = write_pages(out, rows, demo.evaluation.reference, outcomes, setting, notes)
    print_table(rows, title="digits, pruned to half the MACs")
    console.print(f"The original: {control}.")
    console.print(f"{notes['whole demo']} in all. The pruned model, before any training, is in {out / 'pruned'}.")
    console.print(f"The report: {report}")
    return report


def write_pages(
    out: Path,
    rows: list[Measured],
    reference: Tensor,
    outcomes: list[Outcome],
    setting: Setting,
    notes: dict[str, str],
) -> Path:
    """The pictures as files, and the page that shows them."""
    result, shown = outcomes[0].result, slice(setting.shown)
    grids = [
        {"original": reference[shown]}
        | {f"{outcome.name}, {stage}": images[shown] for stage, images in outcome.samples.items()}
        for outcome in outcomes
    ]
    figures = {
        "Samples": (
            sample_grids(grids),
            f"The same noise, {setting.sampling_steps} DDIM steps, no picking. Left: the original. Then every pruned "
            f"model as sliced, as compensated (no training yet), and after {setting.steps} steps of distillation.",
        ),
        "Kept channels": (
            kept_channels(result.plan, result.keep),
            f"Channels that must be removed together form a group; each bar is one group and how much of it stays "
            f"({outcomes[0].name}).",
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
    before_training = {
        "original": reference[:40],
        "half the MACs, sliced": outcomes[0].samples["sliced"][:40],
        "half the MACs, compensated": outcomes[0].samples["compensated"][:40],
    }
    sample_grids(before_training).savefig(out / "before_training.png")
    title = "A digits diffusion model at half the MACs"
    return write_report(
        out / "report.html", rows, figures, title=title, summary=SUMMARY, seeds=1, result=result, notes=notes
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where the checkpoint, pictures and page go")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything; the figures mean nothing")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    run(arguments.out, QUICK if arguments.quick else Setting(), Console())
