"""What ranking and blocks are worth on the digits model: the loss straight after pruning, at several shares of MACs.

    python benchmarks/compare_rankings.py --out benchmarks/results/rankings-digits.json

One scoring per seed ("micro", 512 samples); every selection is taken from those scores and pruned in a copy. No
finetuning: what it repairs is another question.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.utils import logging
from measured import machine

from diffprune_fast import __version__, prune, score, select, trace
from diffprune_fast.evaluation import diffusion_loss

DIGITS = Path(__file__).parents[1] / "examples" / "digits"
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DIGITS / "model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON with every run")
    args = parser.parse_args()
    sys.path.insert(0, str(DIGITS))
    from data import digits

    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    model = UNet2DModel.from_pretrained(args.model).float().eval()
    scheduler = DDPMScheduler.from_pretrained(args.model)
    train, held_out = digits()
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
    if args.out:
        report = {
            "machine": {"cpu": platform.processor() or platform.machine(), "threads": args.threads},
            "versions": {"diffprune_fast": __version__, "torch": torch.__version__},
            "commit": machine()["commit"],
            "plan": plan.hash,
            "dense_loss": dense,
            "runs": rows,
            "table": lines,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        args.out.with_suffix(".md").write_text("\n".join([f"Dense loss {dense:.4f}.", "", "```", *lines, "```", ""]))


if __name__ == "__main__":
    main()
