"""Compare ways to prune on four small models, and how far each gets without and with training.

    python examples/study/study.py --out study                  # everything: many hours; stop and call again at will
    python examples/study/study.py --out study --models photos --budgets 0.5 --stages sliced compensated --samples 0
    python examples/study/study.py --out study --table          # the tables of what is there, in markdown
    python examples/study/study.py --quick                      # a little of everything: does it run at all?

Every figure is a line of ``results.jsonl`` in ``--out``; what is there is not done again. Lines say which model,
criterion, allocation, budget (share of the MACs that stays), seed and stage they belong to.

Stages: "sliced", channels removed and nothing else; "compensated", then solved for; "distilled", then trained towards
the dense model; "finetuned", the sliced model trained on images alone, as was usual. The dense model trained on is the
control. "damage" compares scores with what single clusters of channels cost when a third of them goes. For "micro"
alone: the allocation "measured", and variants of it and of "gauss-newton": the heads' bases turned first, and the dense
model's own samples in place of the data.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1]))
from clusters import damage_rows
from measures import QUICK, Amounts, Bench
from methods import ALLOCATIONS, CRITERIA, VARIANTS, Pruner
from models import SUBJECTS
from tables import tables
from torch import nn

import diffprune_fast
from diffprune_fast.selection import BudgetError

STAGES = ("sliced", "compensated", "distilled", "finetuned")
TRAINED = ("distilled", "finetuned")
MEASURES = ("loss", "likeness")
OURS = ("gauss-newton", "measured")  # allocations by damage


@dataclass(frozen=True)
class Case:
    """One pruned model up to its last stage."""

    model: str
    criterion: str
    allocation: str
    budget: float
    seed: int
    variant: str = "plain"

    def row(self, stage: str, measure: str) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "stage": stage, "measure": measure}


class Results:
    """Lines of a file; each has a key, and a key is written once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self._known = {_key(row) for row in self.rows}

    def has(self, row: dict[str, Any]) -> bool:
        return _key(row) in self._known

    def add(self, row: dict[str, Any]) -> None:
        row = {k: round(v, 7) if isinstance(v, float) else v for k, v in row.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        self._known.add(_key(row))
        names = ("loss", "ssim", "frechet", "damage", "why")
        figures = "  ".join(f"{k} {row[k]}" for k in names if k in row)
        print(" ".join(str(x) for x in _key(row) if x != "None"), " ", figures, flush=True)


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    names = ("model", "criterion", "allocation", "budget", "variant", "seed", "stage", "measure", "cluster")
    return tuple(str(row.get(name)) for name in names)


def cases(args: argparse.Namespace, model: str) -> Iterator[Case]:
    """The first seed of everything first. Variants of our own way alone; the reference once, as it takes minutes."""
    chosen = itertools.product(args.seeds, args.budgets, args.allocations, args.criteria, args.variants)
    for seed, budget, allocation, criterion, variant in chosen:
        ours = criterion == "micro" and allocation in OURS
        aside = variant != "plain" or allocation == "measured"
        if (aside and not ours) or (criterion == "reference" and seed != args.seeds[0]):
            continue
        yield Case(model, criterion, allocation, budget, seed, variant)


def stages_of(case: Case, args: argparse.Namespace) -> list[str]:
    return [s for s in args.stages if s not in TRAINED or case.budget in args.trained]


def prune_in_stages(pruner: Pruner, case: Case, args: argparse.Namespace, results: Results) -> None:
    """Every missing figure of one case."""
    measures = MEASURES if args.samples else MEASURES[:1]
    wanted = [
        (stage, measure)
        for stage in stages_of(case, args)
        for measure in measures
        if not results.has(case.row(stage, measure))
    ]
    if not wanted:
        return
    started = time.perf_counter()
    try:
        keep = pruner.keep(case.criterion, case.allocation, case.budget, case.seed)
    except BudgetError as error:
        for stage, measure in wanted:
            results.add({**case.row(stage, measure), "why": str(error)})
        return
    sliced = pruner.sliced(keep)
    made: dict[str, nn.Module] = {"sliced": sliced.model}
    ways: dict[str, Callable[[], nn.Module]] = {
        "compensated": lambda: pruner.compensated(sliced, case.seed),
        "distilled": lambda: pruner.distilled(stage_model("compensated"), case.seed),
        "finetuned": lambda: pruner.finetuned(sliced.model, case.seed),
    }

    def stage_model(stage: str) -> nn.Module:
        if stage not in made:
            made[stage] = ways[stage]()
        return made[stage]

    for stage, measure in wanted:
        model = stage_model(stage)
        row = {**case.row(stage, measure), "params": sliced.after.params, "macs": sliced.after.macs}
        results.add({**row, **_measured(pruner.bench, model, measure), **_seconds(started)})
        started = time.perf_counter()


def _measured(bench: Bench, model: nn.Module, measure: str) -> dict[str, float]:
    return {"loss": bench.loss(model)} if measure == "loss" else bench.likeness(model)


def _seconds(started: float) -> dict[str, float]:
    return {"seconds": round(time.perf_counter() - started, 1)}


def dense_rows(pruner: Pruner, args: argparse.Namespace, results: Results) -> None:
    """The dense model as it is, and trained on for as many steps as the pruned ones, at two learning rates."""
    bench, name = pruner.bench, pruner.bench.subject.name
    controls: list[tuple[str, int, Callable[[], nn.Module]]] = [("dense", 0, lambda: bench.dense)]
    if args.control and any(stage in TRAINED for stage in args.stages):
        for lr, seed in itertools.product((bench.amounts.lr, bench.amounts.lr / 5), args.seeds):
            controls.append((f"trained on, lr {lr:g}", seed, partial(pruner.finetuned, bench.dense, seed, lr)))
    for stage, seed, make in controls:
        wanted = MEASURES if args.samples else MEASURES[:1]
        rows = {m: {**Case(name, "dense", "-", 1.0, seed).row(stage, m)} for m in wanted}
        missing = [m for m in wanted if not results.has(rows[m])]
        if not missing:
            continue
        started = time.perf_counter()
        model = make()
        size = {"params": pruner.plan.params(), "macs": pruner.plan.macs()}
        for m in missing:
            results.add({**rows[m], **size, **_measured(bench, model, m), **_seconds(started)})


def run(args: argparse.Namespace, amounts: Amounts) -> Results:
    """Everything that ``args`` asks for and the file doesn't have."""
    results = Results(args.out / "results.jsonl")
    for name in args.models:
        bench = Bench(SUBJECTS[name], amounts)
        pruners = {"plain": Pruner(bench)}
        dense_rows(pruners["plain"], args, results)
        if args.damage:
            damage_rows(pruners["plain"], results)
        for case in cases(args, name):
            if case.variant not in pruners:
                pruners[case.variant] = Pruner(bench, case.variant)
            prune_in_stages(pruners[case.variant], case, args, results)
    return results


def environment(amounts: Amounts) -> dict[str, Any]:
    """What the figures depend on beside the options."""
    import diffusers

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return {
        "diffprune_fast": diffprune_fast.__version__,
        "commit": commit.stdout.strip() or None,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "processor": platform.processor() or platform.machine(),
        **dataclasses.asdict(amounts),
    }


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("study"), help="where results.jsonl is or will be")
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, help="default: all")
    parser.add_argument(
        "--budgets", nargs="+", type=float, default=[0.5, 0.7, 0.3], help="shares of the MACs that stay"
    )
    parser.add_argument("--criteria", nargs="+", choices=CRITERIA, default=list(CRITERIA))
    parser.add_argument("--allocations", nargs="+", choices=ALLOCATIONS, default=list(reversed(ALLOCATIONS)))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="of our own way")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--trained", nargs="*", type=float, default=[0.5], help="budgets at which stages train")
    parser.add_argument("--distill-steps", type=int, help="steps of every training (default: 200)")
    parser.add_argument("--samples", type=int, help="images for SSIM and Fréchet distance (default: 256); 0: neither")
    parser.add_argument("--no-control", dest="control", action="store_false", help="the dense model isn't trained on")
    parser.add_argument("--no-damage", dest="damage", action="store_false", help="no single clusters")
    parser.add_argument("--quick", action="store_true", help="in a folder of its own; the figures mean nothing")
    parser.add_argument("--table", action="store_true", help="print the tables and do nothing else")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    logging.set_verbosity_error()
    if args.table:
        print(tables(Results(args.out / "results.jsonl").rows))
        return
    amounts = QUICK if args.quick else Amounts()
    if args.distill_steps is not None:
        amounts = dataclasses.replace(amounts, trained_steps=args.distill_steps)
    if args.samples:
        amounts = dataclasses.replace(amounts, samples=args.samples)
    args.models = args.models or (["dit"] if args.quick else list(SUBJECTS))
    args.samples = amounts.samples if args.samples is None else args.samples
    if args.quick:
        args.budgets, args.seeds, args.trained = args.budgets[:1], args.seeds[:1], args.budgets[:1]
        args.criteria, args.allocations, args.stages = ["micro"], ["gauss-newton"], list(STAGES[:3])
        with tempfile.TemporaryDirectory() as folder:
            args.out = Path(folder)
            print(tables(run(args, amounts).rows))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "environment.json").write_text(json.dumps(environment(amounts), indent=2) + "\n")
    print(tables(run(args, amounts).rows))


if __name__ == "__main__":
    main(parsed())
