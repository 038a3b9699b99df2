"""What the estimators cost and what their choice of channels is worth, on the digits model.

    python benchmarks/compare_estimators.py --out benchmarks/results/estimators-digits.json
    python benchmarks/compare_estimators.py --only micro random --seeds 3

Every run scores the model, prunes a copy (ratio 0.3 of every group, the estimators' common ground) and takes the
held-out loss straight after pruning: no finetuning, which would hide the difference. The keep-sets are compared with
each other: agreement of an estimator with itself over seeds, and with the reference's loop.
"""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel
from measured import comparison_arguments, digits_model, provenance, write_comparison

from diffprune_fast import prune, score, select, trace
from diffprune_fast.evaluation.loss import diffusion_loss

RATIO = 0.3
# estimator, criterion, further options. 1,024 samples of "micro": agreement beyond reach, so that all are used.
RUNS: dict[str, dict[str, Any]] = {
    "micro": {"max_samples": 1024, "min_samples": 1024},
    "micro-512": {"max_samples": 512, "min_samples": 512},
    "mean": {"estimator": "mean", "max_samples": 1024, "min_samples": 1024},
    "magnitude": {"criterion": "magnitude"},
    "random": {"criterion": "random"},
    "reference-quad": {"estimator": "reference-quad"},
    "reference": {"estimator": "reference"},
}


def jaccard(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Kept units in common over kept units in either, all groups together."""
    both = sum(len(np.intersect1d(a[n], b[n])) for n in a)
    return both / sum(len(np.union1d(a[n], b[n])) for n in a)


def one_run(
    model: UNet2DModel, plan: Any, scheduler: Any, data: Any, seed: int, batch: int, options: dict[str, Any]
) -> Any:
    images, held_out = data
    loader = torch.utils.data.DataLoader(images, batch_size=batch, shuffle=True, drop_last=True)
    cpu = time.process_time()
    scores = score(model, loader, plan, scheduler=scheduler, seed=seed, progress=False, **options)
    cpu = time.process_time() - cpu
    row: dict[str, Any] = {"seed": seed, "samples": scores.samples, "cpu_seconds": cpu, "agreement": scores.agreement}
    keeps = {}
    for name, budget in (("local", {"ratio": RATIO}), ("global", {"macs": 0.55, "ranking": "global"})):
        chosen = select(plan, scores, **budget)  # type: ignore[arg-type]
        result = prune(model, plan, chosen.keep, norm_groups=chosen.norm_groups, inplace=False)
        row[name] = {
            "loss": diffusion_loss(result.model, held_out, scheduler, passes=4),
            "params": result.after.params,
            "macs": result.after.macs,
        }
        keeps[name] = dict(chosen.keep)
    return row, keeps["local"]


def summary(rows: dict[str, list[dict[str, Any]]], keeps: dict[str, list[dict[str, np.ndarray]]]) -> list[str]:
    lines = [f"{'estimator':16} {'samples':>8} {'CPU s':>7} {'halves':>6} {'self':>5} {'ref.':>5}  loss after pruning"]
    for name, runs in rows.items():
        own = [jaccard(a, b) for a, b in itertools.combinations(keeps[name], 2)]
        ref = [jaccard(a, b) for a in keeps[name] for b in keeps.get("reference", []) if a is not b]
        cells = [f"{np.mean(v):.3f}" if v else "-" for v in ([r["agreement"] or 0 for r in runs], own, ref)]
        losses = "  ".join(f"{r['local']['loss']:.4f}/{r['global']['loss']:.4f}" for r in runs)
        cost = np.mean([r["cpu_seconds"] for r in runs])
        lines.append(
            f"{name:16} {runs[0]['samples']:8d} {cost:7.1f} {cells[0]:>6} {cells[1]:>5} {cells[2]:>5}  {losses}"
        )
    return [*lines, "loss: at ratio 0.3 in every group / at 0.55 of the MACs, ranked globally; one pair per seed"]


def main() -> None:
    parser = comparison_arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--reference-batch", type=int, default=128, help="images in the reference's one batch")
    args = parser.parse_args()
    model, scheduler, train, held_out = digits_model(args)
    plan = trace(model)
    report: dict[str, Any] = {
        **provenance(args),
        "reference_batch": args.reference_batch,
        "plan": plan.hash,
        "dense_loss": diffusion_loss(model, held_out.images, scheduler, passes=4),
        "runs": {},
    }
    about = f"Dense loss {report['dense_loss']:.4f}; the reference's one batch has {args.reference_batch} images."
    print(f"dense loss {report['dense_loss']:.4f}, {plan.n_units} units", flush=True)
    keeps: dict[str, list[dict[str, np.ndarray]]] = {}
    for name in args.only:
        for seed in range(1 if name == "magnitude" else args.seeds):
            batch = args.reference_batch if name.startswith("reference") else 128
            row, keep = one_run(model, plan, scheduler, (train.images, held_out.images), seed, batch, RUNS[name])
            report["runs"].setdefault(name, []).append(row)
            keeps.setdefault(name, []).append(keep)
            print(f"{name} seed {seed}: {json.dumps(row)}", flush=True)
            write_comparison(args.out, report, about)
    report["table"] = summary(report["runs"], keeps)
    print("\n".join(report["table"]))
    write_comparison(args.out, report, about)


if __name__ == "__main__":
    main()
