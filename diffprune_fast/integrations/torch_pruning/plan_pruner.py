"""Torch-Pruning's importances over the groups of a plan: exact where its dependency graph fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ...plan.plan import Group, Member, Plan
from ...result import PruneResult
from ...selection.options import SelectOptions
from ...selection.select import Selection, select
from ...slicing.prune import prune
from ...tracing.trace import trace
from .layers import pruning_function
from .library import tp

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class PlanGroup:
    """A plan's group as Torch-Pruning's importances read one.

    name: in the plan. group: the ``tp.dependency.Group``; its root's indices are the units, or the ``per_unit``
    channels of each unit one after the other. It is to be read: :meth:`PlanPruner.step` prunes.
    """

    name: str
    group: Any
    n_units: int
    per_unit: int

    def importance(self, importance: Any) -> np.ndarray | None:
        """``(n_units,)`` float64: the mean over each unit's channels; None where the importance counts nothing."""
        found = importance(self.group)
        if found is None:
            return None
        values = found.double().cpu().numpy()[: self.n_units * self.per_unit]
        return values.reshape(self.n_units, self.per_unit).mean(1)


def plan_to_groups(plan: Plan, model: nn.Module) -> list[PlanGroup]:
    """The groups of a plan as Torch-Pruning's importances take them.

    Args:
        plan: what :func:`~diffprune_fast.trace` gave.
        model: the model that it is of.

    Returns:
        One for every group that has a place which Torch-Pruning has a pruning function for, in the plan's order.

    Example:
        >>> import torch, torch_pruning as tp
        >>> from diffprune_fast import trace
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> plan = trace(model, (torch.zeros(1, 4),))
        >>> plan_to_groups(plan, model)[0].importance(tp.importance.MagnitudeImportance()).shape
        (16,)
    """
    modules = dict(model.named_modules())
    nodes: dict[tuple[str, int], Any] = {}
    found = [_plan_group(group, modules, nodes, model) for group in plan.groups]
    return [group for group in found if group is not None]


def _plan_group(
    group: Group, modules: Mapping[str, nn.Module], nodes: dict[tuple[str, int], Any], model: nn.Module
) -> PlanGroup | None:
    places: list[tuple[Member, Any, Any]] = []
    for member in group.members:
        path, _, tensor = member.parameter.rpartition(".")
        layer = modules.get(path)
        function = None if layer is None else pruning_function(layer, tensor, member.dim)
        if function is not None:
            node = nodes.setdefault((path, 0), tp.dependency.Node(layer, None, path))
            places.append((member, node, function))
    if not places:
        return None
    # The length of the first part that counts is the length of the importance.
    places.sort(key=lambda place: (place[0].index.shape[1], tp.prune_linear_out_channels != place[2]))
    per_unit = places[0][0].index.shape[1]
    made = tp.dependency.Group()
    made._DG = SimpleNamespace(model=model)
    root = places[0]
    for member, node, function in places:
        n_units, multiplicity = member.index.shape
        roots = np.arange(n_units)[:, None] * per_unit + np.arange(multiplicity) * per_unit // multiplicity
        item = tp._helpers.GroupItem(
            tp.dependency.Dependency(root[2], function, root[1], node), member.index.reshape(-1).tolist()
        )
        item.root_idxs = roots.reshape(-1).tolist()
        made.items.append(item)
    return PlanGroup(group.name, made, group.n_units, per_unit)


class PlanPruner:
    """Prunes by Torch-Pruning's importances what an exact plan says, with this package's selection and slicing.

    Used as Torch-Pruning's pruners are, on models that its dependency graph can't follow, too.

    Args:
        model: any module; it is pruned in place.
        example_inputs: a tensor, a tuple or a dict; None for diffusers classes that make their own.
        importance: an importance of Torch-Pruning, or :class:`FusedImportance`.
        plan: what :func:`~diffprune_fast.trace` gave, if it is there already.
        budget: ``ratio``, ``params`` or ``macs``, and further options of :func:`~diffprune_fast.select`.

    Example:
        >>> import torch, torch_pruning as tp
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> pruner = PlanPruner(model, torch.zeros(1, 4), tp.importance.MagnitudeImportance(), ratio=0.5)
        >>> pruner.step().after.params
        58
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        importance: Any,
        *,
        plan: Plan | None = None,
        **budget: Unpack[SelectOptions],
    ) -> None:
        self.model, self.importance, self.budget = model, importance, budget
        single = example_inputs is not None and not isinstance(example_inputs, (tuple, list, Mapping))
        self.example_inputs: Any = (example_inputs,) if single else example_inputs
        if isinstance(example_inputs, list):
            self.example_inputs = tuple(example_inputs)
        self.plan = trace(model, self.example_inputs) if plan is None else plan

    def scores(self) -> np.ndarray:
        """``(plan.n_units,)`` importances; units that the importance counts nothing of have their group's mean, 1."""
        found = np.ones(self.plan.n_units)
        for group in plan_to_groups(self.plan, self.model):
            values = group.importance(self.importance)
            if values is not None:
                start = self.plan.offsets[self.plan.position[group.name]]
                found[start : start + group.n_units] = values
        return found

    def select(self) -> Selection:
        """Which units would stay."""
        return select(self.plan, self.scores(), **self.budget)

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer | None = None) -> PruneResult:
        """Score, select and slice; the plan is then that of the smaller model.

        optimizer: of the model's parameters, whose state is sliced with them.
        """
        selection = self.select()
        result = prune(
            self.model,
            self.plan,
            selection.keep,
            norm_groups=selection.norm_groups,
            optimizer=optimizer,
            example_inputs=self.example_inputs,
        )
        self.plan = trace(self.model, self.example_inputs)
        return result
