"""How well scores tell the damage of one group from another's, and what allocating by it is worth, on the digits model.

    python benchmarks/compare_allocations.py --out benchmarks/results/allocations-digits.json

First every cluster of groups is pruned alone, by a third and by two thirds, and the mean squared change of the output
on 128 training images compared with what scores predicted: Spearman's rank correlation. Then the loss straight after
pruning by each allocation, at several shares of MACs: no compensation, no finetuning.
"""

from __future__ import annotations

import json
from typing import Any, get_args

import numpy as np
import torch
from measured import comparison_arguments, digits_model, provenance, write_comparison
from scipy.stats import spearmanr
from torch import Tensor, nn

from diffprune_fast import Plan, prune, score, select, trace
from diffprune_fast.choices import Allocation
from diffprune_fast.evaluation import diffusion_loss
from diffprune_fast.plan.lattice import lattice, rank_units
from diffprune_fast.scoring import Scores
from diffprune_fast.selection.allocation import coherent_curves
from diffprune_fast.selection.ranking import normalised
from diffprune_fast.selection.search import nearest

BUDGETS = (0.7, 0.5)
ALLOCATIONS = get_args(Allocation)
SCORES = ("gauss-newton, coherent", "gauss-newton, added", "micro", "micro / group mean")


def noisy_images(images: Tensor, scheduler: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(99)
    images = images[torch.randperm(len(images), generator=generator)[:128]]
    t = ((torch.arange(128) + torch.rand(128, generator=generator)) / 128 * 1000).long()
    return scheduler.add_noise(images, torch.randn(images.shape, generator=generator), t), t


def single_prunings(
    model: nn.Module, plan: Plan, scores: Scores, inputs: tuple[Tensor, Tensor]
) -> list[dict[str, Any]]:
    """The real change of the output, and what each score says of it, for every cluster alone."""
    assert scores.damage is not None
    of = lattice(plan, "count", 8)
    order = rank_units(of, scores.values, "independent")
    curves = coherent_curves(order, scores.damage)
    divided = normalised(plan, scores.values)
    model.eval()
    with torch.no_grad():
        whole = model(*inputs).sample
    found = []
    for c, levels in enumerate(of.levels.tolist()):
        for share in (2 / 3, 1 / 3):
            chosen = of.levels.copy()
            chosen[c] = nearest(of.allowed[c], share * levels)
            stays = order.kept(chosen)
            if stays.all():
                continue
            parts = np.split(stays, plan.offsets[1:-1])
            keep = {g.name: np.flatnonzero(part) for g, part in zip(plan.groups, parts, strict=True)}
            smaller = prune(model, plan, keep, inplace=False).model.eval()
            with torch.no_grad():
                change = float((smaller(*inputs).sample - whole).square().mean())
            says = (curves[c][chosen[c]], *(v[~stays].sum() for v in (scores.damage, scores.values, divided)))
            name = plan.groups[int(np.argmax(of.cluster == c))].name
            found.append({"cluster": name, "kept": chosen[c] / levels, "change": change})
            found[-1]["scores"] = dict(zip(SCORES, map(float, says), strict=True))
    return found


def main() -> None:
    args = comparison_arguments(__doc__).parse_args()
    model, scheduler, train, held_out = digits_model(args)
    plan = trace(model)
    runs: list[dict[str, Any]] = []
    alone: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        loader = torch.utils.data.DataLoader(train.images, batch_size=128, shuffle=True, drop_last=True)
        scores = score(model, loader, plan, scheduler=scheduler, seed=seed, max_samples=512, progress=False)
        for macs in BUDGETS:
            for allocation in ALLOCATIONS:
                chosen = select(plan, scores, macs=macs, allocation=allocation)  # type: ignore[arg-type]
                result = prune(model, plan, chosen.keep, inplace=False)
                loss = diffusion_loss(result.model, held_out.images, scheduler, passes=2)
                size = {"params": result.after.params, "seconds": scores.seconds}
                runs.append({"seed": seed, "macs": macs, "allocation": allocation, "loss": loss, **size})
                print(json.dumps(runs[-1]), flush=True)
        if seed == 0:
            alone = single_prunings(model, plan, scores, noisy_images(train.images, scheduler))
    change = [a["change"] for a in alone]
    ranks = {name: float(spearmanr(change, [a["scores"][name] for a in alone]).statistic) for name in SCORES}
    lines = [f"{name:24} {value:+.3f}" for name, value in ranks.items()]
    lines.append(
        f"rank correlation with the real change of the output, {len(alone)} prunings of one cluster alone, seed 0"
    )
    for allocation in ALLOCATIONS:
        for macs in BUDGETS:
            here = [r["loss"] for r in runs if (r["allocation"], r["macs"]) == (allocation, macs)]
            cell = f"{np.mean(here):.4f} ({min(here):.4f} - {max(here):.4f})"
            lines.append(f"{allocation:13} macs={macs}: {cell}")
    lines.append(f"held-out loss straight after pruning, mean and range of {args.seeds} seeds")
    print("\n".join(lines))
    report = {**provenance(args), "plan": plan.hash, "rank_correlation": ranks, "alone": alone, "runs": runs}
    write_comparison(args.out, {**report, "table": lines}, "")


if __name__ == "__main__":
    main()
