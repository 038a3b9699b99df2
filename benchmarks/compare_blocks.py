"""Whether the costs of residual blocks rank them as removing them does, on the digits model.

    python benchmarks/compare_blocks.py --out benchmarks/results/blocks-digits.json

Truth: the rise of the held-out loss when one block is dropped, straight after, for every block. Against it stand the
costs of ``score_blocks`` by both methods, from 512 training images, over seeds: Spearman's rank correlation.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from measured import comparison_arguments, digits_model, provenance, write_comparison
from scipy.stats import spearmanr

from diffprune_fast import drop_blocks, score_blocks
from diffprune_fast.depth import find_blocks
from diffprune_fast.evaluation.loss import diffusion_loss


def main() -> None:
    args = comparison_arguments(__doc__).parse_args()
    model, scheduler, train, held_out = digits_model(args)
    dense = diffusion_loss(model, held_out.images, scheduler, passes=4)
    rises = {}
    for block in find_blocks(model):
        dropped = drop_blocks(model, block.name, inplace=False).model
        rises[block.name] = diffusion_loss(dropped, held_out.images, scheduler, passes=4) - dense
    loader = torch.utils.data.DataLoader(train.images, batch_size=128, shuffle=True, drop_last=True)
    runs: list[dict[str, Any]] = []
    for method in ("first-order", "loss"):
        for seed in range(args.seeds):
            cpu = time.process_time()
            scores = score_blocks(model, loader, scheduler=scheduler, method=method, seed=seed, progress=False)
            costs = {b.name: float(c) for b, c in zip(scores.blocks, scores.costs)}
            found = spearmanr([costs[n] for n in rises], list(rises.values())).statistic
            runs.append({"method": method, "seed": seed, "cpu_seconds": time.process_time() - cpu, "costs": costs})
            runs[-1] |= {"samples": scores.samples, "halves": scores.agreement, "spearman": float(found)}
            print(method, seed, f"{found:.3f}", flush=True)
    lines = [f"{'block':30} {'rise of the loss':>16} {'first-order':>12}   (mean of {args.seeds} seeds)"]
    for name, rise in sorted(rises.items(), key=lambda item: item[1]):
        mine = [r["costs"][name] for r in runs if r["method"] == "first-order"]
        lines.append(f"{name:30} {rise:16.5f} {sum(mine) / len(mine):12.5f}")
    for method in ("first-order", "loss"):
        mine = [r for r in runs if r["method"] == method]
        cells = " ".join(f"{r['spearman']:.2f}" for r in mine)
        cpu = sum(r["cpu_seconds"] for r in mine) / len(mine)
        lines.append(f"{method}: rank correlation with the rise {cells}, {cpu:.0f} CPU s")
    print("\n".join(lines))
    report = {**provenance(args), "dense_loss": dense, "rises": rises, "runs": runs, "table": lines}
    write_comparison(args.out, report, f"Dense loss {dense:.4f}. Blocks may lie inside one another.")


if __name__ == "__main__":
    main()
