"""What ranking and blocks are worth on the digits model: the loss straight after pruning, at several shares of MACs.

    python benchmarks/compare_rankings.py --out benchmarks/results/rankings-digits.json

One scoring per seed ("micro", 512 samples); every selection is taken from those scores and pruned in a copy. No
finetuning: what it repairs is another question.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import torch
from measured import comparison_arguments, digits_model, provenance, write_comparison

from diffprune_fast import prune, score, select, trace
from diffprune_fast.evaluation.loss import diffusion_loss

BUDGETS = (0.6, 0.5, 0.4)
WAYS = tuple(itertools.product(("local", "global"), ("same", "independent"), ("count", "exact")))


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["ranking blocks      norms  " + "".join(f"{f'macs={b}':>16}" for b in BUDGETS)]
    for way in WAYS:
        cells = []
        for budget in BUDGETS:
            here = [r["loss"] for r in rows if r["way"] == list(way) and r["macs"] == budget]
            cells.append(f"{np.mean(here):.4f} ±{np.std(here):.4f}" if here else "-")
        lines.append(f"{way[0]:7} {way[1]:11} {way[2]:6}" + "".join(f"{c:>16}" for c in cells))
    return [*lines, "mean and standard deviation over the seeds of the held-out loss straight after pruning"]


def main() -> None:
    args = comparison_arguments(__doc__).parse_args()
    model, scheduler, train, held_out = digits_model(args)
    plan = trace(model)
    dense = diffusion_loss(model, held_out.images, scheduler, passes=2)
    print(f"dense loss {dense:.4f}", flush=True)
    rows = []
    for seed in range(args.seeds):
        loader = torch.utils.data.DataLoader(train.images, batch_size=128, shuffle=True, drop_last=True)
        scores = score(model, loader, plan, scheduler=scheduler, seed=seed, max_samples=512, progress=False)
        for budget, way in itertools.product(BUDGETS, WAYS):
            ranking, blocks, norm_groups = way
            chosen = select(plan, scores, macs=budget, ranking=ranking, blocks=blocks, norm_groups=norm_groups)
            result = prune(model, plan, chosen.keep, norm_groups=norm_groups, inplace=False)
            loss = diffusion_loss(result.model, held_out.images, scheduler, passes=2)
            rows.append({"seed": seed, "macs": budget, "way": list(way), "loss": loss, "params": result.after.params})
            print(json.dumps(rows[-1]), flush=True)
    lines = table(rows)
    print("\n".join(lines))
    report = {**provenance(args), "plan": plan.hash, "dense_loss": dense, "runs": rows, "table": lines}
    write_comparison(args.out, report, f"Dense loss {dense:.4f}.")


if __name__ == "__main__":
    main()
