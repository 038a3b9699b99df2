"""What ``latency=`` keeps of its promise on this machine, and what it buys against ``macs=`` at the same time.

    python benchmarks/compare_latency.py --out benchmarks/results/latency.json

The digits model and the study's DiT, at one and at sixteen samples. For each share of MACs: prune to it, time it, and
prune to the same time by ``latency=``. Losses are of the compensated models on held-out images, as multiples of the
dense model's. Times are of forwards of the dense and the pruned model in turn, the median of their ratios.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from measured import comparison_arguments, machine, write_comparison

from diffprune_fast import compensate, prune, score, select, trace
from diffprune_fast.evaluation import diffusion_loss
from diffprune_fast.plan.keep_sets import sliced_shapes
from diffprune_fast.promises import costs_of, keep_promises, measurable
from diffprune_fast.rotation.rotate import rotate_heads

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "study"))
from models import SUBJECTS, Loader, Subject

SHARES = (0.7, 0.5)


def example(subject: Subject, model: Any, batch: int) -> dict[str, Any]:
    """The study's own inputs at another batch size."""
    return {name: x[:1].repeat_interleave(batch, dim=0) for name, x in subject.example(model).items()}


def compare(subject: Subject, batch: int, seed: int) -> list[dict[str, Any]]:
    model, scheduler = subject.load()
    train, held_out = subject.data()
    loader, inputs = Loader(subject, train, 64, seed, 64), example(subject, model, batch)
    images = subject.batch_of(held_out.images, held_out.labels)
    plan = trace(model, inputs)
    rotate_heads(model, plan, loader, scheduler=scheduler, seed=seed)
    scores = score(model, loader, plan, scheduler=scheduler, seed=seed, max_samples=512, progress=False)
    began = time.perf_counter()
    budgets = measurable({"latency": 0.5})
    times: Any = costs_of(model, plan, budgets, {}, 8, example_inputs=inputs)["latency"]
    took = time.perf_counter() - began

    def loss(of: Any) -> float:
        return float(diffusion_loss(of, images, scheduler, passes=1))

    dense, rows = loss(model), []

    def row(asked: str, selection: Any, **more: Any) -> dict[str, Any]:
        smaller = prune(model, plan, selection.keep, inplace=False, example_inputs=inputs, proof=False).model
        before, after = times.measured([model, smaller])
        kept = sliced_shapes(model, plan, selection.keep).kept
        compensate(smaller, model, loader, kept=kept, scheduler=scheduler, seed=seed, progress=False)
        found = {
            "model": subject.name, "batch": batch, "seed": seed, "asked": asked,
            "macs": plan.macs(selection.keep) / plan.macs(), "measured": after / before,
            "loss": loss(smaller) / dense, "dense_ms": before * 1e3, "fixed_ms": times.fixed * 1e3, "took_s": took,
            "predicted": float(times(plan.counts(selection.keep))) / times.dense, **more,
        }  # fmt: skip
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}, flush=True)
        rows.append(found)
        return found

    for share in SHARES:
        same = row(f"macs={share}", select(plan, scores, macs=share))["measured"]
        asked = round(min(same, 0.98), 3)

        def choose(costs: Any, asked: float = asked) -> Any:
            return select(plan, scores, latency=asked, costs=costs)

        budgets = measurable({"latency": asked})
        first = choose({"latency": times})
        open_loop = prune(model, plan, first.keep, inplace=False, example_inputs=inputs, proof=False).model
        before, after = times.measured([model, open_loop])
        selection, (promise,) = keep_promises(
            model, plan, budgets, {"latency": times}, choose, example_inputs=inputs
        )  # fmt: skip
        more = {"share": asked, "uncorrected": after / before, "promise_measured": promise.measured}
        row(f"latency={asked}", selection, **more)
    return rows


def main() -> None:
    parser = comparison_arguments(__doc__)
    parser.add_argument("--models", nargs="*", default=["digits", "dit"])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 16])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [
        row
        for name in args.models
        for batch in args.batches
        for seed in range(args.seeds)
        for row in compare(SUBJECTS[name], batch, seed)
    ]
    table = ["model   batch  asked          MACs  predicted  measured  loss"]
    table += [
        f"{r['model']:7} {r['batch']:5}  {r['asked']:13} {r['macs']:5.3f}  {r['predicted']:9.3f}  "
        f"{r['measured']:8.3f}  {r['loss']:.4f}"
        for r in rows
    ]
    print("\n".join(table))
    write_comparison(args.out, {"about": machine(), "rows": rows, "table": table}, "Time asked, predicted, measured.")


if __name__ == "__main__":
    main()
