"""Torch-Pruning's groups within one step of a pruner: the same ones, walked over arrays of indices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .library import tp

_maps, _helpers = tp.dependency.index_mapping, tp._helpers
_TYPES = tp.ops.OPTYPE
_UPDATES: dict[Any, Callable[[Any, Any], None]] = {
    _TYPES.CONCAT: _maps.update_concat_index_mapping,
    _TYPES.SPLIT: _maps.update_split_index_mapping,
    _TYPES.RESHAPE: _maps.update_reshape_index_mapping,
    _TYPES.UNBIND: _maps.update_unbind_index_mapping,
    _TYPES.EXPAND: _maps.update_expand_index_mapping,
    _TYPES.SLICE: _maps.update_slice_index_mapping,
}


class Unknown(Exception):
    """An index mapping that only Torch-Pruning itself can follow."""


class Hybrid:
    """Channels of a layer, each with the root's channel that it goes with; ``(n,)`` int64 both."""

    __slots__ = ("at", "root")

    def __init__(self, at: np.ndarray, root: np.ndarray) -> None:
        self.at, self.root = at, root

    def where(self, mask: np.ndarray) -> Hybrid:
        return self if mask.all() else Hybrid(self.at[mask], self.root[mask])

    def equals(self, other: Hybrid) -> bool:
        return np.array_equal(self.at, other.at) and np.array_equal(self.root, other.root)

    def merged(self, other: Hybrid) -> Hybrid:
        """Both, every channel once: the first that named it says what root it has."""
        at, root = np.concatenate([self.at, other.at]), np.concatenate([self.root, other.root])
        first = np.sort(np.unique(at, return_index=True)[1])
        return Hybrid(at[first], root[first])


class StepGroups:
    """Groups of one dependency graph while nothing but its own groups is pruned.

    Torch-Pruning recomputes every index mapping for every group and walks over Python objects, one per channel. Here
    the mappings of the nodes that were touched since are recomputed, and the walk is over arrays; the groups are
    equal, item by item.
    """

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self._touched: dict[Any, None] | None = None  # nodes; None: all of them

    def touch(self, node: Any) -> None:
        if self._touched is not None:
            for other in (node, *node.inputs, *node.outputs):
                self._touched[other] = None

    def group(self, module: Any, prune: Any, idxs: Sequence[int]) -> Any:
        """As ``DependencyGraph.get_pruning_group``. Raises Unknown where only that can tell."""
        graph = self.graph
        if module not in graph.module2node or not isinstance(idxs, (list, tuple)):
            raise Unknown
        self._update_mappings()
        if isinstance(module, tp.ops.TORCH_CONV) and module.groups == module.out_channels > 1:
            prune = tp.prune_depthwise_conv_out_channels
        node = graph.module2node[module]
        root = tp.dependency.Dependency(prune, prune, source=node, target=node)
        at = np.asarray(idxs, np.int64).reshape(-1)
        return self._as_group(_merged(_walk(root, Hybrid(at, at)), graph.ignored_params))

    def _update_mappings(self) -> None:
        if self._touched is None:
            _maps.update_index_mapping(self.graph)
        else:
            for node in self._touched:
                if node.type in _UPDATES:
                    _UPDATES[node.type](self.graph, node)
        self._touched = {}

    def _as_group(self, items: list[tuple[Any, Hybrid]]) -> Any:
        group = tp.dependency.Group()
        group._DG = self.graph
        for dep, found in items:
            item = _helpers.GroupItem(dep, found.at.tolist())
            item.root_idxs = found.root.tolist()
            group.items.append(item)
        return group


def _walk(root: Any, idxs: Hybrid) -> list[tuple[Any, Hybrid]]:
    """Every dependency that the root triggers, in Torch-Pruning's order: the last one found is followed first."""
    found = [(root, idxs)]
    named: dict[tuple[int, int, int], list[Hybrid]] = {_key(root): [idxs]}
    visited, stack = set(), [(root, idxs)]
    while stack:
        dep, here = stack.pop()
        visited.add(dep.target)
        for then in dep.target.dependencies:
            if then.trigger != dep.handler:
                continue
            there = here
            for mapping in then.index_mapping:
                if mapping is not None:
                    there = _mapped(mapping, there)
            if len(there.at) == 0:
                continue
            same = named.setdefault(_key(then), [])
            if then.target in visited and any(there.equals(other) for other in same):
                continue
            same.append(there)
            found.append((then, there))
            stack.append((then, there))
    return found


def _key(dep: Any) -> tuple[int, int, int]:
    """What a dependency prunes: two with the same layer and the same pruning function are one place."""
    handler = dep.handler
    return id(dep.target), id(getattr(handler, "__self__", handler)), id(getattr(handler, "__func__", handler))


def _merged(found: list[tuple[Any, Hybrid]], ignored: Sequence[Any]) -> list[tuple[Any, Hybrid]]:
    """One item per place, where it was found first."""
    items: dict[tuple[int, int, int], tuple[Any, Hybrid]] = {}
    for dep, idxs in found:
        if any(dep.target.module is p for p in ignored):
            continue
        key = _key(dep)
        items[key] = (items[key][0], items[key][1].merged(idxs)) if key in items else (dep, idxs)
    return list(items.values())


def _mapped(mapping: Any, idxs: Hybrid) -> Hybrid:
    """What one of Torch-Pruning's index mappings gives."""
    kind = type(mapping)
    if kind is _maps._ConcatIndexMapping and not mapping.reverse:
        return Hybrid(idxs.at + mapping.offset[0], idxs.root)
    if kind in (_maps._ConcatIndexMapping, _maps._SplitIndexMapping):
        low, high = mapping.offset
        if (kind is _maps._SplitIndexMapping) == bool(mapping.reverse):
            return Hybrid(idxs.at + low, idxs.root)
        inside = idxs.where((idxs.at >= low) & (idxs.at < high))
        return Hybrid(inside.at - low, inside.root)
    if kind is _maps._FlattenIndexMapping and not mapping.reverse:
        stride = mapping._stride
        at = (idxs.at[:, None] * stride + np.arange(stride)).reshape(-1)
        return Hybrid(at, np.repeat(idxs.root, stride))
    if kind is _maps._SliceIndexMapping and not mapping.reverse:
        offset = idxs.at - mapping.start
        inside = idxs.where((offset >= 0) & (idxs.at < mapping.end) & (offset % mapping.step == 0))
        return Hybrid((inside.at - mapping.start) // mapping.step, inside.root)
    if kind is _maps._SliceIndexMapping:
        return Hybrid(idxs.at * mapping.step + mapping.start, idxs.root)
    return _by_itself(mapping, idxs)


def _by_itself(mapping: Any, idxs: Hybrid) -> Hybrid:
    """Called as it is, with one object per channel: the order that it gives is part of the group."""
    pairs = zip(idxs.at.tolist(), idxs.root.tolist())
    found = mapping([_helpers._HybridIndex(idx=i, root_idx=r) for i, r in pairs])
    if any(not isinstance(i.idx, int) or not isinstance(i.root_idx, int) for i in found):
        raise Unknown
    at, root = [i.idx for i in found], [i.root_idx for i in found]
    return Hybrid(np.array(at, np.int64), np.array(root, np.int64))
