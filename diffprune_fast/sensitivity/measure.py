"""Every cluster pruned and compensated alone, and what the model's output then loses: :func:`measure_sensitivities`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..choices import NormGroups, Offsets
from ..compensation.calibration import Calibration, asleep, drawn
from ..compensation.consumers import Consumer, Kept, consumers, norms
from ..compensation.estimates import Form, agreed, decided, means_of, measured
from ..compensation.record import Target, record
from ..compensation.solve import Solver, summed
from ..objective.checks import check_weights
from ..objective.isolation import unwrapped
from ..objective.loss import LossFunction, make_objective
from ..objective.loss_run import sum_dtype
from ..objective.outputs import outputs_seen
from ..objective.ranks import rank_and_count
from ..plan.keep_sets import sliced_shapes
from ..plan.lattice import Lattice, Ranking, lattice, rank_units
from ..plan.plan import Keep, Plan
from ..progress import bar
from ..pruned.held_tensors import copied
from ..scoring.checks import AUTOCAST
from ..scoring.scores import Scores, Sensitivities
from ..selection.budgets import match_groups
from ..selection.ranking import check_scores
from ..selection.search import nearest
from ..slicing.execute import slicing_steps

# Shares of a cluster's units that go. Five, from .2 to .9, were no better: 1.025 times the dense loss, three 1.024 (a
# DiT at half its MACs).
SHARES = (1 / 3, 2 / 3, 0.85)
# Solved from, and judged on, so many.
SAMPLES = 64
HELD_BACK = 64
RIDGE = 1e-3


def measure_sensitivities(
    model: nn.Module,
    loader: Iterable[Any] | None,
    plan: Plan,
    scores: Scores,
    *,
    scheduler: Any = None,
    loss_fn: LossFunction | None = None,
    norm_groups: NormGroups = "count",
    round_to: int | None = 8,
    offsets: Offsets = "independent",
    ignore: Sequence[str] = (),
    seed: int = 0,
    autocast: str | torch.dtype | None = None,
    backend: str = "auto",
    progress: bool = True,
) -> Scores:
    """Try what every cluster of groups costs: pruned alone, by a third, two thirds and 85 %, and compensated.

    Groups that constraints tie to one another are one cluster. The layers that read it are solved anew as
    :func:`~diffprune_fast.compensate` does, from 64 samples; the change of the model's output is that on 64 others, at
    all timesteps alike. Nothing of the model changes. In torch.distributed the ranks share the samples and end with the
    same numbers.

    Args:
        model: the model that ``plan`` was traced from.
        loader, scheduler, loss_fn, autocast: as for :func:`~diffprune_fast.score`.
        plan: what :func:`~diffprune_fast.trace` gave.
        scores: what :func:`~diffprune_fast.score` gave: which units of a group go.
        norm_groups, round_to, offsets, ignore: as for :func:`~diffprune_fast.select`; groups to ignore aren't tried.
        seed: the same one gives the same numbers.
        backend: see :func:`~diffprune_fast.prune`.
        progress: shows a bar, which says how long it will take.

    Returns:
        The scores with their ``sensitivities``, for ``select(..., allocation="measured")``.

    Raises:
        ValueError, TypeError: a loader that doesn't fit the model, or none; an objective whose model is never called.
        FloatingPointError: a change that is NaN or infinite.

    Example:
        >>> from diffprune_fast import score, select, trace
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> def loss_fn(model, batch, t, noise):
        ...     return (model(batch + noise) - noise).square().mean(1)
        >>> data, plan = [torch.randn(64, 4)], trace(model, (torch.zeros(1, 4),))
        >>> scores = score(model, data, plan, max_samples=64, progress=False, loss_fn=loss_fn)
        >>> scores = measure_sensitivities(model, data, plan, scores, loss_fn=loss_fn, round_to=1, progress=False)
        >>> scores.sensitivities.shares.round(2)
        array([[0.31, 0.69, 0.88]])
        >>> len(select(plan, scores, macs=0.5, allocation="measured", round_to=1).keep["0"])
        8
    """
    begin = time.perf_counter()
    if loader is None:
        raise ValueError("sensitivities are measured with images: give a loader")
    model = unwrapped(model)
    device = check_weights(model)
    of = lattice(plan, norm_groups, round_to or 1)
    order = rank_units(of, check_scores(plan, scores.values), offsets)
    trials = _trials(plan, of, ignore)
    shares = np.full((len(plan.groups), len(SHARES)), np.nan)
    damage = shares.copy()
    with torch.inference_mode(False), torch.no_grad(), asleep(model):
        data = drawn(
            model,
            loader,
            scheduler=scheduler,
            loss_fn=loss_fn,
            samples=SAMPLES,
            held_back=HELD_BACK,
            seed=seed,
            autocast=AUTOCAST[autocast],
            device=device,
        )
        objective = make_objective(model, scheduler, loss_fn).kind
        bench = _Bench(model, plan, data, objective, device, seed, backend)
        bench.remember(_least(plan, of, order, trials))
        for t in bar(trials, desc="measuring", show=progress and rank_and_count()[0] == 0, unit="trial"):
            chosen = of.levels.copy()
            chosen[t.cluster] = t.level
            groups = of.cluster == t.cluster
            shares[groups, t.point] = 1 - t.level / of.levels[t.cluster]
            damage[groups, t.point] = bench.damage(plan.keep_of(order.kept(chosen)))
    return replace(scores, sensitivities=Sensitivities(shares, damage, data.samples, time.perf_counter() - begin))


class _Trial(NamedTuple):
    """A cluster that keeps ``level`` of its levels; ``point``: which of its trials this is."""

    cluster: int
    level: int
    point: int


def _trials(plan: Plan, of: Lattice, ignore: Sequence[str]) -> list[_Trial]:
    ignored = {int(c) for mask in match_groups(plan, ignore, "ignore") for c in of.cluster[mask]}
    found = []
    for c, (choices, q) in enumerate(zip(of.allowed, of.levels.tolist(), strict=True)):
        if len(choices) > 1 and c not in ignored:
            levels = {int(nearest(choices[:-1], (1 - share) * q)) for share in SHARES}
            found += [_Trial(c, level, i) for i, level in enumerate(sorted(levels, reverse=True))]
    return found


def _least(plan: Plan, of: Lattice, order: Ranking, trials: Sequence[_Trial]) -> Keep:
    """What all trials at once would leave."""
    chosen = of.levels.copy()
    for t in trials:
        chosen[t.cluster] = min(chosen[t.cluster], t.level)
    return plan.keep_of(order.kept(chosen))


class _Bench:
    """The dense model, what its layers and it answer, and how far copies that lost a cluster are from that."""

    def __init__(
        self, dense: nn.Module, plan: Plan, data: Calibration, kind: str, device: torch.device, seed: int, backend: str
    ) -> None:
        self._dense, self._plan, self._data, self._kind = dense, plan, data, kind
        self._device, self._seed, self._backend = device, seed, backend
        self._wanted = self._outputs(dense)
        self._forms: Mapping[str, Form] = {}
        self._targets: dict[str, Target] = {}

    def remember(self, keep: Keep) -> None:
        """Run the dense model once: all outputs of the layers that lose inputs where no more than ``keep`` stays."""
        layers = [replace(layer, outputs=None, factor=None) for layer in self._layers(*self._sliced(keep))]
        works, forward, live = measured(self._dense, self._dense, layers, self._data)
        how = decided(works, "full", *agreed(means_of(self._device), forward, self._device), live)
        self._forms = how.forms
        layers = [layer for layer in layers if layer.name in how.forms]
        self._targets = record(
            self._dense, layers, self._data, rows=how.rows, of_inputs=frozenset(), seed=self._seed, half=how.half
        )

    def damage(self, keep: Keep) -> float:
        """The mean squared change of the output when only ``keep`` stays and its layers are solved anew."""
        pruned, kept = self._sliced(keep)
        layers = self._layers(pruned, kept)
        targets = {layer.name: self._target(layer) for layer in layers if layer.name in self._targets}
        with asleep(pruned):
            Solver(pruned, self._dense, targets, self._forms, RIDGE, lambda: None).run(layers, self._data)
            found = self._outputs(pruned)
        size = sum(x.numel() for x in self._wanted)
        error = sum(float((a - b).double().square().sum()) for a, b in zip(found, self._wanted, strict=True))
        total = summed(torch.tensor([error, size], dtype=sum_dtype(self._device), device=self._device))
        change = float(total[0] / total[1])
        if not math.isfinite(change):
            raise FloatingPointError(f"the model's output is {change} off when one cluster goes: look for NaN in it")
        return change

    def _sliced(self, keep: Keep) -> tuple[nn.Module, Kept]:
        pruned = copied(self._dense)
        sliced = sliced_shapes(pruned, self._plan, keep)
        for step in slicing_steps(pruned, self._plan, sliced, backend=self._backend):
            step()
        return pruned, sliced.kept

    def _layers(self, pruned: nn.Module, kept: Kept) -> list[Consumer]:
        layers, _ = consumers(pruned, self._dense, kept)
        return layers + norms(pruned, self._dense, kept, len(layers))

    def _target(self, layer: Consumer) -> Target:
        whole = self._targets[layer.name]
        values = whole.values if layer.outputs is None else whole.values.index_select(1, layer.outputs)
        if layer.factor is not None:
            values = values * layer.factor.to(values.device, values.dtype)
        return replace(whole, values=values)

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        """What the model gives for the samples that nothing is solved from; this rank's."""
        last: list[Tensor] = []
        with outputs_seen(model, self._kind, lambda outputs: last.__setitem__(slice(None), outputs)):
            self._data.loss(model)
        return last
