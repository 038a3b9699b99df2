"""Compare what a recovery can minimise, at equal time: every loss trains the same compensated model for as long.

    python examples/study/recovery_losses.py --out study        # two models, minutes
    python examples/study/recovery_losses.py --out study --table
    python examples/study/recovery_losses.py --quick            # does it run at all?

Time is the process's CPU time on one thread, so that other work on the machine counts little: steps of all losses are
timed in turn, three rounds of them, and each gets as many steps as fit by its fastest round. Every result is a line of
``recovery.jsonl`` in ``--out``; what is there is not done again.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1]))
from measures import QUICK, Amounts, Bench
from methods import Pruner
from models import SUBJECTS
from torch import nn

from diffprune_fast.recovery import finetune

BUDGET = 0.5
ROUNDS, TIMED_STEPS = 3, 4
STARTS = "compensated"


@dataclass(frozen=True)
class Way:
    """A loss by its name in ``finetune``; lr: None is what ``finetune`` takes."""

    loss: str
    lr: float | None = None

    @property
    def name(self) -> str:
        return self.loss if self.lr is None else f"{self.loss}, lr {self.lr:g}"


# Each at two rates where it counts, so that the rate explains nothing.
WAYS = (
    Way("noise"),
    Way("noise", 5e-4),
    Way("distillation"),
    Way("distillation", 5e-4),
    Way("mixed", 5e-4),
    Way("features", 5e-4),
    Way("second-order", 5e-4),
)


class Trainer:
    """Trains copies of one compensated model."""

    def __init__(self, pruner: Pruner, seed: int) -> None:
        self._bench, self._seed = pruner.bench, seed
        sliced = pruner.sliced(pruner.keep("micro", "gauss-newton", BUDGET, seed))
        self.start = pruner.compensated(sliced, seed)

    def trained(self, way: Way, steps: int) -> nn.Module:
        model, bench = copy.deepcopy(self.start), self._bench
        teacher = None if way.loss == "noise" else bench.dense
        options: dict[str, Any] = {"lr": way.lr, "teacher": teacher, "loss": way.loss, "seed": self._seed}
        options["guard"] = False  # what a loss comes to, also where it is worse
        finetune(model, bench.loader(self._seed), bench.scheduler, steps=steps, progress=False, **options)
        return model

    def seconds_per_step(self, ways: Sequence[Way]) -> dict[str, float]:
        """CPU seconds of a step of each, the least of a few rounds."""
        found: dict[str, list[float]] = {way.name: [] for way in ways}
        for _ in range(ROUNDS):
            for way in ways:
                before = time.process_time()
                self.trained(way, TIMED_STEPS)
                found[way.name].append((time.process_time() - before) / TIMED_STEPS)
        return {name: min(seconds) for name, seconds in found.items()}


def figures(bench: Bench, model: nn.Module) -> dict[str, float]:
    """The held-out loss, and the likeness to the dense model: of the outputs and of the samples."""
    return {"loss": bench.loss(model), "distance": bench.damage(model), "ssim": bench.likeness(model)["ssim"]}


def run(models: Sequence[str], seeds: Sequence[int], seconds: float, path: Path, amounts: Amounts) -> list[Any]:
    """Every missing line of the file; gives all of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {(row["model"], row["seed"], row["way"]) for row in rows}

    def add(row: dict[str, Any]) -> None:
        rows.append({k: round(v, 7) if isinstance(v, float) else v for k, v in row.items()})
        with path.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(rows[-1], flush=True)

    for name in models:
        missing = {seed: [w for w in WAYS if (name, seed, w.name) not in known] for seed in seeds}
        if not any(missing.values()):
            continue
        bench = Bench(SUBJECTS[name], amounts)
        pruner = Pruner(bench)
        if (name, 0, "dense") not in known:
            add({"model": name, "seed": 0, "way": "dense", **figures(bench, bench.dense)})
        for seed, ways in missing.items():
            trainer = Trainer(pruner, seed)
            if (name, seed, STARTS) not in known:
                add({"model": name, "seed": seed, "way": STARTS, **figures(bench, trainer.start)})
            cost = trainer.seconds_per_step(WAYS) if ways else {}
            for way in ways:
                steps = max(1, round(seconds / cost[way.name]))
                before = time.process_time()
                model = trainer.trained(way, steps)
                spent = time.process_time() - before
                about = {"steps": steps, "cpu_seconds": spent, "asked_seconds": seconds}
                add({"model": name, "seed": seed, "way": way.name, **about, **figures(bench, model)})
    return rows


def table(rows: Sequence[Any]) -> str:
    """A line for each model and loss, in markdown."""
    lines = [
        "| model | loss | steps | CPU seconds | held-out loss | distance to the dense outputs | SSIM | seed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        costs = f"{r['steps']} | {r['cpu_seconds']:.0f}" if "steps" in r else " | "
        known = f"{r['loss']:.4f} | {r['distance']:.5f} | {r['ssim']:.3f} | {r['seed']}"
        lines.append(f"| {r['model']} | {r['way']} | {costs} | {known} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("study"), help="where recovery.jsonl is or will be")
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=["digits", "dit"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--seconds", type=float, default=45.0, help="of CPU time, each")
    parser.add_argument("--quick", action="store_true", help="in a folder of its own; the figures mean nothing")
    parser.add_argument("--table", action="store_true", help="print the table and do nothing else")
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    if args.table:
        return print(table([json.loads(line) for line in (args.out / "recovery.jsonl").read_text().splitlines()]))
    if args.quick:
        with tempfile.TemporaryDirectory() as folder:
            return print(table(run(args.models[1:], [0], 0.1, Path(folder) / "recovery.jsonl", QUICK)))
    print(table(run(args.models, args.seeds, args.seconds, args.out / "recovery.jsonl", Amounts(samples=64))))
    return None


if __name__ == "__main__":
    main()
