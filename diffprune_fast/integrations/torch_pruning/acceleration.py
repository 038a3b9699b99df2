"""``accelerate``: Torch-Pruning's own pruners, with the bytes moved and the importances summed by our kernels."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .autograd_graph import let_go
from .importance import LookUp, MissingGradient, places, reduced
from .library import tp
from .pending import Pending, as_indices
from .step_groups import StepGroups, Unknown

_function = tp.pruner.function
_Func, _Group, _Dependency = _function.BasePruningFunc, tp.dependency.Group, tp.dependency.Dependency
_Pruner = tp.pruner.algorithms.base_pruner.BasePruner
_Taylor, _Magnitude = tp.importance.GroupTaylorImportance, tp.importance.GroupMagnitudeImportance

# Pruners of layers that read nothing from their parameters but what `_prune_parameter_and_grad` gives them.
_DEFERRABLE = {
    _function.ConvPruner,
    _function.DepthwiseConvPruner,
    _function.LinearPruner,
    _function.BatchnormPruner,
    _function.LayernormPruner,
    _function.GroupNormPruner,
    _function.InstanceNormPruner,
    _function.PReLUPruner,
    _function.EmbeddingPruner,
    _function.MultiheadAttentionPruner,
    *(
        pruner
        for pruner in vars(tp.ops).values()
        if isinstance(pruner, type) and issubclass(pruner, tp.ops.DummyPruner)
    ),
}


class Acceleration:
    """What is going on inside one ``with accelerate()``."""

    def __init__(self) -> None:
        self.pending = Pending()
        self._depth = 0
        self._look_ups: dict[int, LookUp] | None = None
        self._groups: StepGroups | None = None

    def kept(self, model: nn.Module) -> dict[tuple[str, int], np.ndarray]:
        """``(parameter, dim)`` to the indices that are left of what the model had when the block began.

        It is what :func:`~diffprune_fast.compensate` takes.
        """
        found = {}
        for name, p in model.named_parameters():
            for dim, keep in sorted(self.pending.kept(p).items()):
                found[name, dim] = keep
        return found

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is pruned inside is sliced when the outermost of these blocks ends, however it ends."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self.pending.flush()

    @contextmanager
    def ranking(self) -> Iterator[None]:
        """Inside, one pass over the weights serves all groups that an importance is asked for."""
        outer, self._look_ups = self._look_ups, {}
        try:
            yield
        finally:
            self._look_ups = outer

    def parameter(
        self, original: Callable[..., Any], pruner: Any, weight: Tensor, keep_idxs: Any, pruning_dim: int
    ) -> Any:
        """In place of a pruner's ``_prune_parameter_and_grad``."""
        indices = as_indices(keep_idxs)
        new: Any = self.pending.cut(weight, indices, pruning_dim)
        if new is None:  # nothing that the kernels take
            self.pending.flush()
            new = original(pruner, weight, keep_idxs, pruning_dim).requires_grad_(weight.requires_grad)
            self.pending.note(weight, new, indices, pruning_dim)
        elif self._depth == 0:
            self.pending.flush()
        return new

    def prune(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of a group's ``prune``."""
        with self.together():
            return original(*args, **kwargs)

    def dependency(self, original: Callable[..., Any], dep: Any, idxs: Any) -> Any:
        """In place of calling a dependency: other people's pruners find tensors sliced, and leave them sliced."""
        if self._groups is not None:
            self._groups.touch(dep.target)
        if type(getattr(dep.handler, "__self__", None)) in _DEFERRABLE:
            return original(dep, idxs)
        self.pending.flush()
        depth, self._depth = self._depth, 0
        try:
            return original(dep, idxs)
        finally:
            self._depth = depth

    def group(self, original: Callable[..., Any], graph: Any, module: Any, pruning_fn: Any, idxs: Any) -> Any:
        """In place of a dependency graph's ``get_pruning_group``."""
        if self._groups is not None and self._groups.graph is graph:
            try:
                return self._groups.group(module, pruning_fn, idxs)
            except Unknown:
                pass
        return original(graph, module, pruning_fn, idxs)

    def taylor(self, original: Callable[..., Any], importance: Any, group: Any) -> Any:
        """In place of a Taylor importance's call."""
        return self._importance(original, importance, group, "signed" if importance.multivariable else "abs", 2)

    def magnitude(self, original: Callable[..., Any], importance: Any, group: Any) -> Any:
        """In place of a magnitude importance's call."""
        return self._importance(original, importance, group, "magnitude", importance.p)

    def _importance(
        self, original: Callable[..., Any], importance: Any, group: Any, element: str, p: float
    ) -> Tensor | None:
        if self._look_ups is None:
            return original(importance, group)
        look_up = self._look_ups.setdefault(id(importance), LookUp(element, p))
        parts = list(places(importance, group, taylor=element != "magnitude"))
        with torch.no_grad():
            try:
                look_up.refresh(group, [weight for (weight, _, _), _ in parts])
                values = look_up.values(parts)
            except MissingGradient:
                return original(importance, group)
            return reduced(importance, values, [roots for _, roots in parts])

    def step(self, original: Callable[..., Any], pruner: Any, interactive: bool = False) -> Any:
        """In place of a pruner's step: what it ranks is summed in one pass, what it prunes is sliced in one launch."""
        let_go(pruner.DG)
        if interactive:
            return self._interactive(original, pruner)
        with self.ranking():
            if type(pruner)._prune is not _Pruner._prune:  # one that may look at tensors between two groups
                return original(pruner)
            outer, self._groups = self._groups, StepGroups(pruner.DG)
            try:
                with self.together():
                    return original(pruner)
            finally:
                self._groups = outer

    def _interactive(self, original: Callable[..., Any], pruner: Any) -> Any:
        groups = original(pruner, interactive=True)
        if groups is None:
            return None

        def ranked() -> Iterator[Any]:
            with self.ranking():  # every group is ranked before the first is handed out
                first = next(groups, None)
            if first is not None:
                yield first
                yield from groups

        return ranked()


_active: ContextVar[Acceleration | None] = ContextVar("diffprune_fast_torch_pruning", default=None)
_lock = threading.Lock()
_users = 0
_originals: dict[tuple[type, str], Any] = {}


@contextmanager
def accelerate() -> Iterator[Acceleration]:
    """Let Torch-Pruning slice, and sum its Taylor and magnitude importances, with this package's kernels.

    A context manager, and a decorator. Inside, ``BasePruner.step()`` reads all weights once and slices all tensors in
    one launch, every ``group.prune()`` and pruning function slices in one; which channels go is Torch-Pruning's to
    say. Frozen parameters stay frozen and channels_last weights channels_last, which it doesn't see to itself. Only
    the thread (and asyncio task) that entered is concerned; once the last ``with`` block has ended, Torch-Pruning's
    classes are as they were. Importances of other classes, pruners of other layers and those that choose groups in a
    way of their own work as they do outside, with what can be accelerated of them.

    Returns:
        What is going on inside; ``kept(model)`` of it says which channels are left.

    Example:
        >>> import torch, torch_pruning as tp
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> x, importance = torch.randn(8, 4), tp.importance.MagnitudeImportance()
        >>> pruner = tp.pruner.BasePruner(model, x, importance, pruning_ratio=0.5, ignored_layers=[model[2]])
        >>> with accelerate() as inside:
        ...     pruner.step()
        >>> model[0].out_features, len(inside.kept(model)["2.weight", 1])
        (8, 8)
    """
    outer = _active.get()
    acceleration = Acceleration() if outer is None else outer
    _install()
    token = _active.set(acceleration)
    try:
        yield acceleration
    finally:
        _active.reset(token)
        _uninstall()


# What is replaced, and the method of Acceleration that stands in; without an active block the original is called.
_REPLACED: dict[tuple[type, str], str] = {
    (_Func, "_prune_parameter_and_grad"): "parameter",
    (_Group, "prune"): "prune",
    (_Dependency, "__call__"): "dependency",
    (tp.DependencyGraph, "get_pruning_group"): "group",
    (_Pruner, "step"): "step",
    (_Taylor, "__call__"): "taylor",
    (_Magnitude, "__call__"): "magnitude",
}


def _redirected(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        inside = _active.get()
        if inside is None:
            return original(*args, **kwargs)
        return getattr(inside, name)(original, *args, **kwargs)

    return call


def _install() -> None:
    global _users
    with _lock:
        if _users == 0:
            for (owner, name), method in _REPLACED.items():
                _originals[owner, name] = vars(owner)[name]
                setattr(owner, name, _redirected(_originals[owner, name], method))
        _users += 1


def _uninstall() -> None:
    global _users
    with _lock:
        _users -= 1
        if _users == 0:
            for (owner, name), original in _originals.items():
                setattr(owner, name, original)
            _originals.clear()
