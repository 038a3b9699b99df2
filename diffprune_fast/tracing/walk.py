"""What rules may call: labels of tensors, the graph, costs and attributes that follow a width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.attributes import DIM_ATTRIBUTES, HEAD_ATTRIBUTES
from .channels import Nodes
from .graph import Graph
from .labels import Labels, Layer, Layers, varying
from .meta import to_meta
from .records import Attended, CostTerm, ScaleTerm, Step, place_of


class Walk:
    """What a walk has found so far, and what rules may do with it; the tracer calls the rules."""

    def __init__(self, model: nn.Module, nodes: Nodes, graph: Graph) -> None:
        self.nodes = nodes
        self.graph = graph
        self.costs: list[CostTerm] = []
        self.scales: list[ScaleTerm] = []
        self.leaks: list[Labels] = []
        self.statistics = 0
        self.attributes: dict[tuple[str, str], Layer] = {}
        self.scale_attributes: dict[tuple[str, str], Layer] = {}
        self.attended: list[Attended] = []
        self.steps: list[Step] = []
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
        return place_of(self.module, func)

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
