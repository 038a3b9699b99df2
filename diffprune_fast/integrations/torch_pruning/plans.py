"""From Torch-Pruning's dependency graph to a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...plan.plan import Plan
from ...tracing.channels import Channels
from ...tracing.graph import Graph
from ...tracing.grouping import build_plan
from ...tracing.records import CostTerm
from ...tracing.walk import Walk
from .layers import cut_of
from .library import tp


def plan_from_dependency_graph(
    graph: Any,
    *,
    ignored_layers: Sequence[nn.Module] = (),
    example_inputs: Any = None,
) -> Plan:
    """What a dependency graph of Torch-Pruning says of its model, as a plan for select, prune and compensate.

    Channels that its groups couple become units; what no group names, what reaches an output of the model, and layers
    with a pruner of their own stay, with the reason in ``plan.frozen``. :func:`~diffprune_fast.prune` checks what the
    graph says and refuses what it couples wrongly. It doesn't tell heads apart, nor know of the softmax scale that
    follows their size: put the layers that make queries, keys and values into ``ignored_layers``.

    Args:
        graph: a ``DependencyGraph`` whose ``build_dependency`` was called; its model must not have been pruned since.
        ignored_layers: modules whose channels stay, as the pruners take them.
        example_inputs: what ``build_dependency`` was given; without them the plan has no costs, and budgets of MACs
            can't be asked for.

    Returns:
        The plan: groups of units, norm groups and the widths of grouped convolutions as constraints.

    Example:
        >>> import torch, torch_pruning as tp
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> graph = tp.DependencyGraph().build_dependency(model, torch.zeros(1, 4))
        >>> plan = plan_from_dependency_graph(graph)
        >>> print(plan.groups[0].name, plan.groups[0].n_units, [m.place for m in plan.groups[0].members])
        0 16 ['0.weight:0', '0.bias:0', '2.weight:1']
    """
    model = graph.model
    channels = Channels.of(model)
    walk = Walk(model, channels, Graph(channels.total))
    reader = _Reader(walk, graph)
    for group in graph.get_all_groups(ignored_layers=list(ignored_layers), root_module_types=_ROOTS):
        reader.read(group)
    reader.freeze_the_rest()
    if example_inputs is not None:
        _count_macs(walk, example_inputs)
    return build_plan(model, walk)


_ROOTS = (tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR, tp.ops.TORCH_EMBED, tp.ops.TORCH_LSTM)


class _Reader:
    """Writes groups down as edges between channels."""

    def __init__(self, walk: Walk, graph: Any) -> None:
        self.walk, self.graph = walk, graph
        self.named: set[tuple[str, int]] = set()

    def read(self, group: Any) -> None:
        found: list[tuple[np.ndarray, np.ndarray]] = []  # channels, and the root's channels that they go with
        reasons = []
        for item in group.items:
            target = item.dep.target
            if not target.outputs and self.graph.is_out_channel_pruning_fn(item.dep.handler):
                reasons.append("is an output of the model")
            if isinstance(target.module, nn.Parameter):
                cut: Mapping[str, int] | None = {self.graph._param_to_name[target.module]: target.pruning_dim}
                modulo = 0
            elif target.module not in self.walk.by_name.values():
                continue  # an operation
            else:
                cut, modulo = self._places(target.module, item.dep.handler)
            if cut is None:
                reasons.append(f"{type(target.module).__name__} has a pruner of its own")
                continue
            if any(r is None for r in item.root_idxs):
                reasons.append("goes with channels that the dependency graph doesn't name")
                continue
            for name, dim in cut.items():
                found += self._channels(name, dim, item, modulo)
        for ids, roots in found:
            order = np.argsort(roots, kind="stable")
            self._link(ids[order], roots[order], found[0])
            for reason in reasons:
                self.walk.graph.freeze(ids, reason)

    def _link(self, ids: np.ndarray, roots: np.ndarray, first: tuple[np.ndarray, np.ndarray]) -> None:
        of_root = np.zeros(int(max(roots.max(), first[1].max())) + 1, np.int64)
        of_root[first[1]] = first[0]
        known = of_root[roots] > 0
        self.walk.graph.link(of_root[roots][known], ids[known], "a group of the dependency graph")

    def _channels(self, name: str, dim: int, item: Any, modulo: int) -> list[tuple[np.ndarray, np.ndarray]]:
        shape = self.walk.channels.shapes.get(name)
        if shape is None:
            return []
        dim %= len(shape)
        start = self.walk.channels.start.get((name, dim))
        self.named.add((name, dim))
        if start is None or not item.idxs:
            return []
        index = np.asarray(item.idxs, np.int64)
        return [(start + (index % modulo if modulo else index), np.asarray(item.root_idxs, np.int64))]

    def _places(self, layer: nn.Module, prune: Any) -> tuple[dict[str, int] | None, int]:
        """The tensors that are cut, by name, and their constraints and attributes as a side effect."""
        cut = cut_of(layer, prune)
        if cut is None:
            return None, 0
        path, walk = self.walk.modules[id(layer)], self.walk
        places = {}
        for tensor, dim in cut.dims.items():
            name = walk.channels.names.get(id(getattr(layer, tensor, None)))
            if name is not None:
                places[name] = dim
        if places and (whole := walk.channels.start.get(next(iter(places.items())))) is not None:
            name, dim = next(iter(places.items()))
            ids = np.arange(whole, whole + walk.channels.shapes[name][dim], dtype=np.int32)
            for attribute in cut.attributes:
                walk.attributes[path, attribute] = np.tile(ids, layer.groups) if cut.modulo else ids  # type: ignore
            self._constrain(layer, prune, path, ids)
        return places, cut.modulo

    def _constrain(self, layer: Any, prune: Any, path: str, ids: np.ndarray) -> None:
        if isinstance(layer, nn.GroupNorm):
            kind = "norm" if len(ids) > layer.num_groups else "instance_norm"
            self.walk.graph.constrain(kind, path, ids.reshape(layer.num_groups, -1))
        if prune == tp.prune_conv_out_channels and layer.groups > 1 and not layer.transposed:
            self.walk.graph.constrain("conv_groups", path, ids.reshape(layer.groups, -1))

    def freeze_the_rest(self) -> None:
        for (name, dim), start in self.walk.channels.start.items():
            if (name, dim) not in self.named:
                size = self.walk.channels.shapes[name][dim]
                self.walk.graph.freeze(np.arange(start, start + size), "is in no group of the dependency graph")


def _count_macs(walk: Walk, example_inputs: Any) -> None:
    """Costs of convolutions and linear layers, from one forward of the example inputs."""

    def count(module: Any, inputs: Any, output: Tensor) -> None:
        name = walk.channels.names.get(id(module.weight))
        if name is None:
            return
        convolution = isinstance(module, nn.modules.conv._ConvNd)
        sample = inputs[0] if convolution and module.transposed else output
        places = sample[0, 0].numel() if convolution else output.numel() // output.shape[-1]
        maps = []
        for dim in (0, 1):
            start = walk.channels.start.get((name, dim))
            if start is not None:
                maps.append(np.arange(start, start + module.weight.shape[dim], dtype=np.int32))
        total = places * module.weight.numel() // int(np.prod([len(m) for m in maps]))
        walk.costs.append(CostTerm(walk.modules[id(module)], total, tuple(maps), False))

    model = walk.by_name[""]
    hooks = [
        m.register_forward_hook(count) for m in model.modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))
    ]
    try:
        with torch.no_grad():
            call(model, example_inputs)
    finally:
        for hook in hooks:
            hook.remove()


def call(model: nn.Module, example_inputs: Any) -> Any:
    """A forward as Torch-Pruning calls it: a dict's names, a tuple's or list's elements, or the one input."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    return model(*example_inputs) if isinstance(example_inputs, (tuple, list)) else model(example_inputs)
