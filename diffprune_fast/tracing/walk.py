"""One forward on ``meta`` with labels beside every activation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..position_tables import Table, table_of
from . import constants, contractions, movement, norms, numbers, scales, statistics  # noqa: F401  (they fill RULES)
from .attributes import FROZEN_CLASSES, INPUT_ATTRIBUTES
from .errors import TraceError, explained
from .heads import DIM_ATTRIBUTES, HEAD_ATTRIBUTES, Attended
from .labels import Graph, Labels, Layer, Layers, varying
from .meta import hooked, inputs_on_meta, on_meta, outputs_in, to_meta
from .nodes import Nodes
from .rules import RULES, unknown

Calls = Sequence[tuple[str, tuple[Any, ...], dict[str, Any]]]


@dataclass
class CostTerm:
    place: str
    scale: int
    layers: Layers
    attention: bool


class Walk(TorchDispatchMode):
    """The dispatch mode under which the model runs; rules call back into it."""

    def __init__(self, model: nn.Module, nodes: Nodes, graph: Graph) -> None:
        super().__init__()
        self.nodes = nodes
        self.graph = graph
        self.costs: list[CostTerm] = []
        self.scales: list[scales.ScaleTerm] = []
        self.leaks: list[Labels] = []
        self.statistics = 0
        self.attributes: dict[tuple[str, str], Layer] = {}
        self.scale_attributes: dict[tuple[str, str], Layer] = {}
        self.attended: list[Attended] = []
        self.steps: list[numbers.Step] = []
        self.modules = {id(m): n for n, m in model.named_modules()}
        self.by_name = dict(model.named_modules())
        self.stack: list[str] = []
        self.failed: tuple[Any, ...] | None = None

    def labels(self, t: Any) -> Labels | None:
        return getattr(t, "_channel_labels", None)

    def label(self, t: Tensor, labels: Labels | None) -> None:
        t._channel_labels = labels if labels is not None and labels.layers else None  # type: ignore[attr-defined]

    @property
    def module(self) -> str:
        """The name of the module that is running."""
        return self.stack[-1] if self.stack else ""

    def place(self, func: Any) -> str:
        return numbers.place_of(self.module, func)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The op itself, on meta where any operand is there."""
        tensors = list(self.tensors((args, kwargs)))
        if any(t.device.type == "meta" for t in tensors):
            if not all(t.device.type == "meta" for t in tensors):
                args, kwargs = to_meta(args), to_meta(kwargs)
            if "device" in kwargs and kwargs["device"] is not None:
                kwargs = {**kwargs, "device": torch.device("meta")}
        elif tensors and kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": tensors[0].device}  # numbers and ids keep their values
        try:
            return func(*args, **kwargs)
        except Exception:
            self.failed = args
            raise

    def tensors(self, tree: Any) -> Iterator[Tensor]:
        if isinstance(tree, Tensor):
            yield tree
        elif isinstance(tree, (list, tuple)):
            for x in tree:
                yield from self.tensors(x)
        elif isinstance(tree, dict):
            for x in tree.values():
                yield from self.tensors(x)

    def functional(self, func: Any) -> Callable[..., Any]:
        """The out-of-place form of an op, to run it on labels."""
        name = func.overloadpacket.__name__
        if name.endswith("_") and hasattr(torch.Tensor, name[:-1]):
            return getattr(torch.Tensor, name[:-1])
        return func

    def graph_freeze(self, t: Tensor, dims: Sequence[int], reason: str) -> None:
        labels = self.labels(t)
        for layer in labels.layers if labels is not None else ():
            if any(layer.shape[d] > 1 for d in dims):
                self.graph.freeze(layer, reason)

    def cost(self, func: Any, total: int, layers: Layers, attention: bool = False) -> None:
        """``total`` multiply-accumulates, proportional to the sizes of the labelled dims."""
        used: list[Layer] = []
        dims: set[int] = set()
        for x in sorted(layers, key=lambda y: -y.size):
            mine = set(varying(x)) if x.ndim > 1 else {-1 - len(used)}
            if not mine & dims:
                used.append(x)
                dims |= mine
                total //= x.size
        self.costs.append(CostTerm(self.place(func), total, tuple(used), attention))

    def name_of(self, t: Tensor) -> str | None:
        return getattr(t, "_parameter_name", None)

    def regrouped(self, before: Layer, after: Layer, place: str) -> Layer:
        """A layer after a reshape; over heads only where it was split into heads that go as a whole."""
        if len(varying(after)) <= len(varying(before)):
            return after
        module = self.module
        heads = self.graph.by_heads(after, module, place)
        if heads is None:
            return after
        per_head = heads.reshape(-1, heads.shape[varying(heads)[-1]])[0]
        while module and not self._head_attributes(module, HEAD_ATTRIBUTES, per_head):
            module = module.rpartition(".")[0]
        return heads

    def _head_attributes(self, module: str, names: Sequence[str], layer: Layer) -> bool:
        """Note the module's attributes, of these names, that hold the size of a layer; whether there are any."""
        held = vars(self.by_name[module])
        found = [a for a in names if type(held.get(a)) is int and held[a] == layer.size]
        for name in found:
            self.attributes[module, name] = layer
        return bool(found)

    def attend(self, *operands: Tensor) -> None:
        """Note what an attention product brings together: heads, dims, channels."""
        for t in operands:
            labels = self.labels(t)
            for layer in labels.layers if labels is not None else ():
                found = Attended.of(self.module, layer)
                if found is not None and found.rows is not None:
                    self.attended.append(found)
                    self._head_attributes(self.module, DIM_ATTRIBUTES, found.rows[0])
            if labels is None and t.dim() == 4:
                self.attended.append(Attended(self.module, t.shape[1], t.shape[3], None))

    def attribute(self, parameter: Tensor, name: str, *layers: Layer) -> None:
        """A module attribute that follows the size of a layer."""
        owner = self.name_of(parameter)
        if owner is None or not layers:
            return
        module = self.module
        held = self.by_name[module]._parameters.values()
        if not any(getattr(p, "_parameter_name", None) == owner for p in held):  # a tied one has several owners
            module = owner.rpartition(".")[0]
        if isinstance(getattr(self.by_name.get(module), name, None), (int, tuple)):
            self.attributes[module, name] = layers[0].reshape(-1)

    def norm_attribute(self, weight: Tensor | None, name: str, layer: Layer) -> None:
        """Like :meth:`attribute`, also for a norm without parameters (then it is the running module's)."""
        if weight is not None:
            self.attribute(weight, name, layer)
        elif self.stack and hasattr(self.by_name[self.module], name):
            self.attributes[self.module, name] = layer.reshape(-1)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = list(self.tensors((args, kwargs)))
        statistic = statistics.follow(self, name, args, tensors) if self.statistics else None
        made = constants.follow(func, args, tensors)
        out = self._followed(func, args, kwargs, tensors)
        if made is not None:
            out._made = made
        if statistic is not None:
            out._statistic = statistic
        scales.note_leaks(self, name, tensors, kwargs, out)
        numbers.note(self, func, args, kwargs, tensors, out)
        return out

    def _followed(self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> Any:
        rule = RULES.get(func._schema.name)
        if rule is not None:
            return rule(self, func, args, kwargs)
        if not any(self.labels(t) is not None for t in tensors):
            return self.run(func, args, kwargs)
        with self:
            out = func.decompose(*args, **kwargs)
        return unknown(self, func, args, kwargs) if out is NotImplemented else out

    def enter(self, module: nn.Module, inputs: Any) -> None:
        name = self.modules.get(id(module))
        if name is None:
            return
        self.stack.append(name)
        kind = type(module).__name__
        if kind in INPUT_ATTRIBUTES:
            labels = self.labels(inputs[0]) if inputs else None
            for layer in labels.layers if labels is not None else ():
                if varying(layer) == (1,):
                    for attribute in INPUT_ATTRIBUTES[kind]:
                        self.attributes[name, attribute] = layer.reshape(-1)
        table = table_of(module)
        if table is not None:
            self._fit(module, table, inputs)
        if kind in FROZEN_CLASSES:
            for p in module.parameters():
                for layer in self.nodes.layers(self.name_of(p) or ""):
                    self.graph.freeze(layer, FROZEN_CLASSES[kind])

    def _fit(self, module: nn.Module, rule: Table, inputs: Any) -> None:
        """A table of positions for inputs of another size, with the labels of the one that there is."""
        size = rule.wanted(module, inputs)
        old = getattr(module, rule.buffer)
        if size != rule.held(module):
            new = torch.empty((1, rule.positions(module, size), old.shape[-1]), dtype=old.dtype, device="meta")
            labels = self.labels(old)
            self.label(new, Labels(tuple([x for x in labels.layers if varying(x) == (2,)])) if labels else None)
            new._parameter_name = self.name_of(old)  # type: ignore[attr-defined]
            rule.hold(module, size, new)

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.stack and id(module) in self.modules:
            self.stack.pop()

    def follow(self, model: nn.Module, calls: Calls) -> None:
        """:meth:`go`, with an error that says where the forward failed. Raises TraceError."""
        try:
            self.go(model, calls)
        except TraceError:
            raise
        except Exception as error:
            raise TraceError(explained(model, self, error)) from error

    def go(self, model: nn.Module, calls: Calls, kept: Mapping[tuple[str, int], np.ndarray] | None = None) -> None:
        """Run the calls; labels of the parameters are ``nodes``' (those of ``kept`` for a sliced model)."""
        with on_meta(model, self.nodes, kept), hooked(self.enter, self.leave):
            for method, args, kwargs in calls:
                f = model if method == "forward" else getattr(model, method)
                with torch.inference_mode(), self:
                    out = f(*inputs_on_meta(args), **inputs_on_meta(kwargs))
                self.stack.clear()
                for t in outputs_in(out, set()):
                    if getattr(t, "_statistic", None) is not None:
                        statistics.freeze(self, t._statistic)  # type: ignore[attr-defined]
                    labels = self.labels(t)
                    for layer in labels.layers if labels is not None else ():
                        self.graph.freeze(layer, "is an output of the model")
        scales.settle(self)
