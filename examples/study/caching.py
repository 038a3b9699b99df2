"""Does pruning add up with diffusers' caches, in seconds and in likeness to the dense model's samples?

    python examples/study/caching.py --out study        # the study's transformer, minutes
    python examples/study/caching.py --quick            # does it run at all?

Time is the process's CPU time on one thread, so that other work on the machine counts little: the least of a few
rounds, in which all are timed in turn. Fewer steps without a cache are what a cache has to be better than.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig
from diffusers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import CLASSES, SUBJECTS, Loader
from torch import Tensor, nn

import diffprune_fast as dpf
from diffprune_fast.evaluation import sample, ssim

BUDGET = 0.5


@dataclass(frozen=True)
class Way:
    """cache: what ``sample`` takes. steps: a share of all steps."""

    name: str
    cache: Any = None
    steps: float = 1.0


WAYS = (
    Way("none"),
    Way("none, 0.6 of the steps", steps=0.6),
    Way("first-block, 0.1", "first-block"),
    Way("first-block, 0.2", FirstBlockCacheConfig(threshold=0.2)),
    Way("pyramid-attention", "pyramid-attention"),
    Way("faster-cache", "faster-cache"),
)


def pruned(subject: Any, seed: int, scored: int) -> tuple[nn.Module, dpf.PruneResult]:
    model, scheduler = subject.load()
    loader = Loader(subject, subject.data()[0], subject.batch, seed)
    asked: dict[str, Any] = {"macs": BUDGET, "min_samples": min(scored, 512), "max_samples": scored}
    result = dpf.score_and_prune(model, loader, scheduler=scheduler, seed=seed, progress=False, **asked)
    return model, result


def run(n: int, steps: int, rounds: int, scored: int, seed: int) -> list[dict[str, Any]]:
    """A row for each model and way; seconds and likeness are relative to the dense model without a cache."""
    subject = SUBJECTS["dit"]
    dense, scheduler = subject.load()
    small, result = pruned(subject, seed, scored)
    models = {"dense": dense, "pruned": small}
    noise = torch.randn(n, 1, 16, 16, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(n) % CLASSES
    cases = [(model, way) for model in models for way in WAYS]
    seconds: dict[tuple[str, str], list[float]] = {(name, way.name): [] for name, way in cases}
    images: dict[tuple[str, str], Tensor] = {}
    for _ in range(rounds):
        for name, way in cases:
            before = time.process_time()
            asked = round(way.steps * steps)
            images[name, way.name] = sample(models[name], scheduler, noise, steps=asked, labels=labels, cache=way.cache)
            seconds[name, way.name].append(time.process_time() - before)
    first = ("dense", WAYS[0].name)
    rows = []
    for name, way in cases:
        found, want = images[name, way.name], images[first]
        row = {"model": name, "cache": way.name, "time": min(seconds[name, way.name]) / min(seconds[first])}
        row |= {"mse": float((found - want).square().mean()), "ssim": ssim(found, want)}
        rows.append({**row, "n": n, "steps": round(way.steps * steps), "seed": seed, "macs": result.after.macs})
        print(rows[-1], flush=True)
    return rows


def table(rows: Sequence[Any]) -> str:
    """A line for each model and cache, in markdown."""
    lines = ["| model | cache | time | MSE | SSIM |", "| --- | --- | --- | --- | --- |"]
    for r in rows:
        lines.append(f"| {r['model']} | {r['cache']} | {r['time']:.2f} | {r['mse']:.4f} | {r['ssim']:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("study"), help="where caching.jsonl will be")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="writes nothing; the figures mean nothing")
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    if args.quick:
        return print(table(run(2, 6, 1, 16, args.seed)))
    rows = run(16, 50, 2, 1024, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "caching.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return print(table(rows))


if __name__ == "__main__":
    main()
