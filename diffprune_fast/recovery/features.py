"""Distillation of features: the model's channels are some of the teacher's, and the keep-sets say which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ..architectures.layers import CONVOLUTIONS, TRANSPOSED
from ..checkpoint.manifest import unpack_runs
from ..choices import Units
from ..plan.keep_sets import sliced_shapes
from ..plan.plan import Plan
from ..pruned.record import record_of
from ..rotation.heads import find_heads
from ..tracing.trace import trace
from .distillation import Distillation

# Features further from their layer's mean are left out, in standard deviations: a few channels of trained networks are
# hundreds of times as large as the rest, and would be all that is learnt.
OUTLIERS = 2.0
# Layers that are compared: each one's features are held until the backward pass.
LAYERS = 16


@dataclass(frozen=True)
class FeatureDistillation(Distillation):
    """Beside the distance of the answers, that of the features of some layers, relative to the teacher's; a
    :data:`StepLoss`.

    A layer's share is sum((ours - theirs)^2) / sum(theirs^2) over the teacher's kept channels, without what is further
    than two standard deviations from the layer's mean; ``weight`` times the mean of all layers, in units of the
    teacher's answers, is added.

    layers: name to the teacher's channels that the model's layer of that name still has, None for all;
    :func:`shared_layers` finds them.
    """

    layers: Mapping[str, Tensor | None] | None = None
    weight: float = 0.1

    def __call__(self, model: nn.Module, batch: Any, t: Tensor, noise: Tensor) -> Tensor:
        """The loss of one step. Raises ValueError where no layer is compared, or one was never run."""
        if not self.layers:
            raise ValueError("no layer's features can be compared: give layers=, or another loss")
        with outputs_of(model, self.layers) as ours, outputs_of(self.teacher, self.layers) as theirs:
            answers = super().__call__(model, batch, t, noise)
        shares = [
            relative_distance(mine, true, kept, _channels_of(model.get_submodule(name)))
            for name, kept in self.layers.items()
            for mine, true in zip(ours[name], theirs[name])
        ]
        if not shares:
            raise ValueError(f"none of the layers was run: {', '.join(list(self.layers)[:3])}")
        return answers + self.weight * torch.stack(shares).mean()


def relative_distance(ours: Tensor, theirs: Tensor, kept: Tensor | None, dim: int) -> Tensor:
    """Squared distance of ``ours`` to the ``kept`` channels of ``theirs`` along ``dim``, relative to these, without
    outliers."""
    wide = torch.float64 if ours.dtype == torch.float64 else torch.float32
    ours, theirs = ours.to(wide), theirs.detach().to(ours.device, wide)
    if kept is not None:
        theirs = theirs.index_select(dim, kept.to(theirs.device))
    inside = (theirs - theirs.mean()).abs() <= OUTLIERS * theirs.std(correction=0)
    size = (theirs.square() * inside).sum()
    return ((ours - theirs).square() * inside).sum() / size.clamp_min(torch.finfo(wide).tiny)


@contextmanager
def outputs_of(model: nn.Module, names: Mapping[str, Any]) -> Iterator[dict[str, list[Tensor]]]:
    """What the layers of these names give while this lasts, call by call."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: found[name].append(output))
        for name in names
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def shared_layers(
    model: nn.Module, teacher: nn.Module, example_inputs: Any = None, *, most: int = LAYERS
) -> dict[str, Tensor | None]:
    """The convolutions and linear layers whose features can be compared, at most so many, spread over the model.

    The model's record says which channels it kept. Queries, keys and values are left out: their heads may have another
    basis in the pruned model.

    example_inputs: as for :func:`diffprune_fast.trace`, of the teacher.

    Raises ValueError for a model that wasn't pruned from ``teacher``.
    """
    plan, keep = _pruned_by(model, teacher, example_inputs)
    kept = sliced_shapes(teacher, plan, keep).kept
    pairs = find_heads(teacher, plan)[0]
    turned = {place.module for pair in pairs for side in (pair.left, pair.right) for place in side if place.dim == 0}
    ours, found = dict(model.named_modules()), {}
    for name, layer in teacher.named_modules():
        if not isinstance(layer, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)) or name in turned or name not in ours:
            continue
        dim = int(isinstance(layer, TRANSPOSED))
        index = kept.get((f"{name}.weight", dim))
        if getattr(ours[name], "weight", None) is None or type(ours[name]) is not type(layer):
            continue
        if ours[name].weight.shape[dim] == (layer.weight.shape[dim] if index is None else len(index)):
            found[name] = None if index is None else torch.from_numpy(index)
    chosen = np.unique(np.linspace(0, len(found) - 1, most).round().astype(int)) if len(found) > most else None
    return found if chosen is None else {name: found[name] for i, name in enumerate(found) if i in chosen}


def _pruned_by(model: nn.Module, teacher: nn.Module, example_inputs: Any) -> tuple[Plan, dict[str, np.ndarray]]:
    about = record_of(model).about
    if not about.get("keep"):
        raise ValueError(f"this {type(model).__name__} has no record of a pruning: its features have no counterparts")
    keep = {name: unpack_runs(runs) for name, runs in about["keep"].items()}
    plans: list[Plan] = []
    for units in get_args(Units):
        plans.append(trace(teacher, example_inputs, units=units))
        if plans[-1].hash == about["plan"]:
            return plans[-1], keep
    # A plan of other example inputs has other costs, so its hash differs: then the same groups are enough.
    for plan in plans:
        if _has_groups(plan, keep):
            return plan, keep
    raise ValueError(
        f"this {type(model).__name__} wasn't pruned from the teacher as it is now: their features can't be matched"
    )


def _has_groups(plan: Plan, keep: Mapping[str, np.ndarray]) -> bool:
    """Whether ``keep`` is a keep-set of this plan's groups."""
    units = {group.name: group.n_units for group in plan.groups}
    return units.keys() == keep.keys() and all(kept.max() < units[name] for name, kept in keep.items())


def _channels_of(layer: nn.Module) -> int:
    """The dim of a layer's output that its channels are along."""
    return -1 if isinstance(layer, nn.Linear) else 1
