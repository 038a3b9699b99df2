"""One forward on ``meta`` with labels beside every activation: who calls the rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..architectures.attributes import FROZEN_CLASSES, INPUT_ATTRIBUTES
from ..architectures.position_tables import Table, table_of
from . import constants, scale_folding, spelled_norms, steps
from .channels import Nodes
from .errors import TraceError, explained
from .graph import Graph
from .labels import Labels, varying
from .meta import hooked, inputs_on_meta, on_meta, outputs_in
from .records import Calls
from .rules import RULES, unknown
from .walk import Walk


def follow(model: nn.Module, channels: Nodes, graph: Graph, calls: Calls) -> Walk:
    """Run the calls on meta and return what the walk found; ``graph`` is filled. Raises TraceError."""
    tracer = Tracer(model, channels, graph)
    try:
        tracer.run(model, calls)
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(explained(type(model).__name__, tracer.walk.module, error)) from error
    return tracer.walk


class Tracer(TorchDispatchMode):
    """The dispatch mode under which the model runs: it hands every operation to its rule and writes it down."""

    def __init__(self, model: nn.Module, channels: Nodes, graph: Graph) -> None:
        super().__init__()
        self.walk = Walk(model, channels, graph)

    def run(self, model: nn.Module, calls: Calls, kept: Mapping[tuple[str, int], np.ndarray] | None = None) -> None:
        """Run the calls; parameters carry the labels of their channels (those of ``kept`` for a sliced model).

        Raises whatever the forward does.
        """
        walk = self.walk
        with on_meta(model, walk.nodes, kept), hooked(self._enter, self._leave):
            for method, args, kwargs in calls:
                f = model if method == "forward" else getattr(model, method)
                with torch.inference_mode(), self:
                    out = f(*inputs_on_meta(args), **inputs_on_meta(kwargs))
                walk.stack.clear()
                for t in outputs_in(out, set()):
                    if getattr(t, "_statistic", None) is not None:
                        spelled_norms.freeze(walk, t._statistic)  # type: ignore[attr-defined]
                    labels = walk.labels(t)
                    for layer in labels.layers if labels is not None else ():
                        walk.graph.freeze(layer, "is an output of the model")
        scale_folding.settle(walk)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = list(self.walk.tensors((args, kwargs)))
        statistic = spelled_norms.follow(self.walk, name, args, tensors) if self.walk.statistics else None
        made = constants.follow(func, args, tensors)
        out = self._apply_rule(func, args, kwargs, tensors)
        if made is not None:
            out._made = made
        if statistic is not None:
            out._statistic = statistic
        scale_folding.note_leaks(self.walk, name, tensors, kwargs, out)
        steps.note(self.walk, func, args, kwargs, tensors, out)
        return out

    def _apply_rule(self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> Any:
        rule = RULES.get(func._schema.name)
        if rule is not None:
            return rule(self.walk, func, args, kwargs)
        if not any(self.walk.labels(t) is not None for t in tensors):
            return self.walk.run(func, args, kwargs)
        with self:
            out = func.decompose(*args, **kwargs)
        return unknown(self.walk, func, args, kwargs) if out is NotImplemented else out

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        walk = self.walk
        name = walk.modules.get(id(module))
        if name is None:
            return
        walk.stack.append(name)
        kind = type(module).__name__
        if kind in INPUT_ATTRIBUTES:
            labels = walk.labels(inputs[0]) if inputs else None
            for layer in labels.layers if labels is not None else ():
                if varying(layer) == (1,):
                    for attribute in INPUT_ATTRIBUTES[kind]:
                        walk.attributes[name, attribute] = layer.reshape(-1)
        table = table_of(module)
        if table is not None:
            self._fit(module, table, inputs)
        if kind in FROZEN_CLASSES:
            for p in module.parameters():
                for layer in walk.nodes.layers(walk.name_of(p) or ""):
                    walk.graph.freeze(layer, FROZEN_CLASSES[kind])

    def _fit(self, module: nn.Module, rule: Table, inputs: Any) -> None:
        """A table of positions for inputs of another size, with the labels of the one that there is."""
        walk = self.walk
        size = rule.wanted(module, inputs)
        old = getattr(module, rule.buffer)
        if size != rule.held(module):
            new = torch.empty((1, rule.positions(module, size), old.shape[-1]), dtype=old.dtype, device="meta")
            labels = walk.labels(old)
            walk.label(new, Labels(tuple([x for x in labels.layers if varying(x) == (2,)])) if labels else None)
            new._parameter_name = walk.name_of(old)  # type: ignore[attr-defined]
            rule.hold(module, size, new)

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.walk.stack and id(module) in self.walk.modules:
            self.walk.stack.pop()
