"""One forward on ``meta`` with labels beside every activation: who calls the rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from ..architectures.attributes import FROZEN_CLASSES, INPUT_ATTRIBUTES
from ..architectures.position_tables import Table, table_of
from . import (
    computed_weights,
    constants,
    flex_attention,
    interface,
    scale_folding,
    spelled_norms,
    steps,
    values,
)
from .caches import nothing_left_outside
from .channels import Channels
from .errors import TraceError, explain_failure
from .graph import Graph
from .labels import Labels, varying
from .meta import LikeADevice, inputs_on_meta, module_hooks, on_meta
from .notes import note_on
from .records import Calls
from .refusals import freeze_flat_weights
from .rules import Operation, apply_rule, has_rule
from .walk import Walk


def walk_forward(model: nn.Module, channels: Channels, graph: Graph, calls: Calls) -> Walk:
    """Run the calls on meta and return what the walk found; ``graph`` is filled. Raises TraceError."""
    tracer = Tracer(model, channels, graph)
    try:
        tracer.run(model, calls)
    except TraceError:
        raise
    except Exception as error:
        if flex_attention.compiles(model, error):
            graph.clear()
            return walk_forward(model, channels, graph, calls)
        raise TraceError(explain_failure(type(model).__name__, tracer.walk.module, error)) from error
    return tracer.walk


class Tracer(TorchDispatchMode):
    """The dispatch mode under which the model runs: it hands every operation to its rule and writes it down."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, channels: Channels, graph: Graph) -> None:
        super().__init__()
        self.walk = Walk(model, channels, graph)

    def run(self, model: nn.Module, calls: Calls, kept: Mapping[tuple[str, int], np.ndarray] | None = None) -> None:
        """Run the calls; parameters carry the labels of their channels (those of ``kept`` for a sliced model).

        Raises whatever the forward does.
        """
        walk = self.walk
        freeze_flat_weights(model, walk.channels, walk.graph)
        with (
            nothing_left_outside(model),
            on_meta(model, walk.channels, kept),
            module_hooks(model, self._enter, self._leave),
            LikeADevice(walk.device),
            flex_attention.not_compiled(model),
        ):
            if any(method == "forward" for method, _, _ in calls):
                interface.latents_stay(model, walk)
            for method, args, kwargs in calls:
                f = model if method == "forward" else getattr(model, method)
                with torch.inference_mode(), self:
                    out = f(*inputs_on_meta(args), **inputs_on_meta(kwargs))
                walk.stack.clear()
                interface.hand_out(walk, out, "is an output of the model")
            interface.note_attributes(walk)
        scale_folding.freeze_unfoldable_heads(walk)
        computed_weights.freeze_gains_read_elsewhere(walk)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not isinstance(func, OpOverload):
            if not flex_attention.is_flex_attention(func):
                raise NotImplementedError(f"{func} has operations of its own, which can't be followed")
            return flex_attention.follow_flex_attention(self.walk, self, args)
        with torch._C.DisableTorchFunction():  # the forward's mode is not asked for every shape that a rule reads
            return self._follow(func, args, kwargs or {})

    def _follow(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func.overloadpacket.__name__
        tensors = self.walk.tensors((args, kwargs))
        statistic = None
        if self.walk.statistics:
            statistic = spelled_norms.statistic_of_output(self.walk, name, args, kwargs, tensors)
        content = constants.content_of_output(func, args, tensors)
        out = self._run(func, args, kwargs, tensors)
        if func._schema.is_mutable:
            self.walk.writes.note_labels(func, args, kwargs)
        if content is not None:
            for t in self.walk.tensors(out):
                note_on(t).content = content
        if statistic is not None:
            spelled_norms.settle(self.walk, statistic, out)
        values.note_origin(func, args, kwargs, tensors, out, len(self.walk.steps), self.walk.writes)
        scale_folding.note_other_uses(self.walk, name, tensors, kwargs, out)
        steps.record_step(self.walk, func, args, kwargs, tensors, out)
        return out

    def _run(self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> Any:
        if has_rule(func):
            return apply_rule(self.walk, func, args, kwargs)
        if not any(self.walk.labels(t) is not None for t in tensors):
            return self.walk.run(func, args, kwargs)
        with self:
            out = func.decompose(*args, **kwargs)
        return Operation(self.walk, func, args, kwargs).run_unknown() if out is NotImplemented else out

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        walk = self.walk
        name = walk.modules[id(module)]
        walk.stack.append(name)
        kind = type(module).__name__
        if kind in INPUT_ATTRIBUTES:
            for label_map in walk.maps(inputs[0]) if inputs else ():
                if varying(label_map) == (1,):
                    for attribute in INPUT_ATTRIBUTES[kind]:
                        if getattr(module, attribute, None) == label_map.size:
                            walk.attributes[name, attribute] = label_map.reshape(-1)
        table = table_of(module)
        if table is not None:
            self._fit(module, table, inputs)
        for reason in [reason for known, reason in FROZEN_CLASSES.items() if isinstance(module, known)]:
            for p in module.parameters():
                for label_map in walk.channels.maps(walk.name_of(p) or ""):
                    walk.graph.freeze(label_map, reason)

    def _fit(self, module: nn.Module, rule: Table, inputs: Any) -> None:
        """A table of positions for inputs of another size, with the labels of the one that there is."""
        walk = self.walk
        size = rule.wanted(module, inputs)
        old = getattr(module, rule.buffer)
        if size != rule.held(module):
            new = torch.empty((1, rule.positions(module, size), old.shape[-1]), dtype=old.dtype, device="meta")
            walk.label(new, Labels(tuple([x for x in walk.maps(old) if varying(x) == (2,)])))
            note_on(new).parameter = walk.name_of(old)
            rule.hold(module, size, new)

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.walk.stack:
            self.walk.stack.pop()
