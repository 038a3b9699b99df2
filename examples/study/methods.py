"""Every way of pruning that the study compares: the pieces of ``score_and_prune``, called one by one.

Scores are the dear part and serve many budgets and allocations, so they are kept.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from measures import Bench
from models import Loader
from torch import nn

from diffprune_fast import PruneResult, Scores, compensate, prune, score, select, trace
from diffprune_fast.recovery import finetune
from diffprune_fast.rotation import rotate_heads
from diffprune_fast.scoring.scores import Sensitivities
from diffprune_fast.sensitivity import measure_sensitivities
from diffprune_fast.slicing import dry_run

# "micro" is Diff-Pruning as this library estimates it, "reference" as the method's published loop does.
CRITERIA: Mapping[str, Mapping[str, str]] = {
    "random": {"criterion": "random"},
    "magnitude": {"criterion": "magnitude"},
    "taylor": {"criterion": "taylor"},
    "micro": {"criterion": "diff-pruning"},
    "reference": {"criterion": "diff-pruning", "estimator": "reference"},
}
ALLOCATIONS = ("mean", "uniform", "gauss-newton", "measured")
VARIANTS = ("plain", "heads rotated", "own samples")
WITHOUT_DATA = ("random", "magnitude")


class Pruner:
    """Prunes copies of one dense model.

    variant: "heads rotated" turns its heads' bases first; "own samples" uses images that it made in place of the data.
    """

    def __init__(self, bench: Bench, variant: str = "plain") -> None:
        self.bench, self._own = bench, variant == "own samples"
        self.dense = _rotated(bench) if variant == "heads rotated" else bench.dense
        self._example = bench.subject.example(self.dense)
        self.plan = trace(self.dense, self._example)
        self._scores: dict[tuple[str, int], Scores] = {}
        self._sensitivities: dict[int, Sensitivities | None] = {}

    def scores(self, criterion: str, seed: int) -> Scores:
        """A criterion's scores, with the damage that a Gauss-Newton allocation goes by."""
        if (criterion, seed) not in self._scores:
            found = self._scored(criterion, seed)
            if criterion != "micro":
                found = dataclasses.replace(found, damage=self.scores("micro", seed).damage)
            self._scores[criterion, seed] = found
        return self._scores[criterion, seed]

    def _loader(self, seed: int, batch: int | None = None) -> Loader:
        return self.bench.loader(seed, batch=batch, own=self._own)

    def _scored(self, criterion: str, seed: int) -> Scores:
        bench, options = self.bench, dict[str, Any](CRITERIA[criterion])
        options["damage"] = criterion == "micro"
        batch = bench.amounts.reference_batch if criterion == "reference" else None
        loader = None if criterion in WITHOUT_DATA else self._loader(seed, batch)
        options |= {"max_samples": bench.amounts.scored, "seed": seed, "progress": False}
        return score(self.dense, loader, self.plan, scheduler=bench.scheduler, **options)

    def keep(self, criterion: str, allocation: str, budget: float, seed: int) -> Mapping[str, np.ndarray]:
        """The units that stay at ``budget`` of the MACs."""
        scores = self.scores(criterion, seed)
        if allocation == "measured":
            scores = self._tried(scores, seed)
        return select(self.plan, scores, macs=budget, **_allocated(allocation)).keep

    def _tried(self, scores: Scores, seed: int) -> Scores:
        """The same with what each cluster costs when it is pruned alone."""
        if seed not in self._sensitivities:
            how = {"scheduler": self.bench.scheduler, "seed": seed, "progress": False}
            found = measure_sensitivities(self.dense, self._loader(seed), self.plan, scores, **how)
            self._sensitivities[seed] = found.sensitivities
        return dataclasses.replace(scores, sensitivities=self._sensitivities[seed])

    def sliced(self, keep: Mapping[str, np.ndarray]) -> PruneResult:
        return prune(self.dense, self.plan, keep, inplace=False, example_inputs=self._example)

    def compensated(self, sliced: PruneResult, seed: int) -> nn.Module:
        """The sliced model, its weights solved for what was removed."""
        model = copy.deepcopy(sliced.model)
        kept = dry_run(self.dense, self.plan, sliced.keep, example_inputs=self._example).kept
        how = {"scheduler": self.bench.scheduler, "seed": seed, "progress": False}
        compensate(model, self.dense, self._loader(seed), kept=kept, **how)
        return model

    def distilled(self, model: nn.Module, seed: int) -> nn.Module:
        """Trained towards the dense model's outputs."""
        return self._trained(model, seed, lr=self.bench.amounts.lr, teacher=self.dense)

    def finetuned(self, model: nn.Module, seed: int, lr: float | None = None) -> nn.Module:
        """Trained as diffusion models are."""
        return self._trained(model, seed, lr=lr or self.bench.amounts.finetune_lr)

    def _trained(self, model: nn.Module, seed: int, **options: Any) -> nn.Module:
        model = copy.deepcopy(model)
        bench, steps = self.bench, self.bench.amounts.trained_steps
        finetune(model, self._loader(seed), bench.scheduler, steps=steps, seed=seed, progress=False, **options)
        return model


def _allocated(allocation: str) -> dict[str, str]:
    """Options of ``select``: every group the same share, or groups compared by mean or by Gauss-Newton."""
    return {"ranking": "local"} if allocation == "uniform" else {"ranking": "global", "allocation": allocation}


def _rotated(bench: Bench) -> nn.Module:
    model = copy.deepcopy(bench.dense)
    rotate_heads(model, trace(model, bench.subject.example(model)), bench.loader(0), scheduler=bench.scheduler)
    return model
