"""One forward on ``meta`` with labels beside every activation."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from . import constants, contractions, movement, norms, scales, statistics  # noqa: F401  (they fill RULES)
from .attributes import FROZEN_CLASSES, INPUT_ATTRIBUTES
from .heads import DIM_ATTRIBUTES, HEAD_ATTRIBUTES, Attended
from .labels import Graph, Labels, Layer, Layers, varying
from .meta import like_a_device
from .rules import RULES, unknown

Calls = Sequence[tuple[str, tuple[Any, ...], dict[str, Any]]]


class TraceError(RuntimeError):
    """The model's forward could not be followed."""


def where_in(walk: Walk, error: BaseException) -> str:
    """The module in which a forward failed, and the line of its code: the last one that isn't PyTorch's or ours."""
    module = f" in {walk.stack[-1]!r}" if walk.stack and walk.stack[-1] else ""
    not_theirs = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(not_theirs)]
    if not frames:
        return module
    path = Path(frames[-1].filename)
    place = "/".join(
        path.parts[path.parts.index("site-packages") + 1 :] if "site-packages" in path.parts else path.parts[-2:]
    )
    return f"{module} at {place}:{frames[-1].lineno}: {frames[-1].line}"


def explained(model: nn.Module, walk: Walk, error: Exception) -> str:
    """What a failed forward means, for its error message."""
    where = where_in(walk, error)
    if "meta tensors" in str(error) or isinstance(error, NotImplementedError):
        return (
            f"the forward of {type(model).__name__} reads values of an activation, which depends on the data: "
            f"{error}{where}. Give example_inputs for which it takes no such branch, or trace the part of the model "
            "below it."
        )
    return (
        f"the forward of {type(model).__name__} failed on the meta device: {error}{where}. Check example_inputs "
        "(shapes and names of the forward's arguments)."
    )


@dataclass
class Nodes:
    """Numbers every channel: node ids of ``(parameter, dim)`` are ``start[(parameter, dim)] + index``; 0 is frozen."""

    names: dict[int, str]
    shapes: dict[str, tuple[int, ...]]
    buffers: frozenset[str]
    start: dict[tuple[str, int], int] = field(default_factory=dict)
    total: int = 1

    @classmethod
    def of(cls, model: nn.Module) -> Nodes:
        """All parameters and floating-point buffers, tied ones once, by their first name."""
        names: dict[int, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, p in model.named_parameters():
            names[id(p)] = name
            shapes[name] = tuple(p.shape)
        buffers = set()
        for name, b in model.named_buffers():
            if b.is_floating_point():
                names[id(b)] = name
                shapes[name] = tuple(b.shape)
                buffers.add(name)
        nodes = cls(names, shapes, frozenset(buffers))
        for name, shape in shapes.items():
            for dim, n in enumerate(shape):
                if n > 1:
                    nodes.start[name, dim] = nodes.total
                    nodes.total += n
        return nodes

    def layers(self, name: str, kept: Mapping[tuple[str, int], np.ndarray] | None = None) -> Layers:
        """One layer per dim of a parameter; ``kept``: the indices that a sliced parameter still has."""
        shape = self.shapes[name]
        layers = []
        for dim, n in enumerate(shape):
            if n > 1:
                index = np.arange(n, dtype=np.int32) if kept is None or (name, dim) not in kept else kept[name, dim]
                view = [1] * len(shape)
                view[dim] = -1
                if index.size > 1:
                    layers.append((self.start[name, dim] + index).astype(np.int32).reshape(view))
        return tuple(layers)


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
        self.constants: list[tuple[str, float]] = []
        self.constant_nodes: list[np.ndarray] = []
        self.modules = {id(m): n for n, m in model.named_modules()}
        self.by_name = dict(model.named_modules())
        self.stack: list[str] = []
        self.failed: tuple[Any, ...] | None = None

    def labels(self, t: Any) -> Labels | None:
        return getattr(t, "_channel_labels", None)

    def label(self, t: Tensor, labels: Labels | None) -> None:
        t._channel_labels = labels if labels is not None and labels.layers else None  # type: ignore[attr-defined]

    def place(self, func: Any) -> str:
        where = self.stack[-1] if self.stack else ""
        return f"{where or 'model'} ({func.overloadpacket.__name__})"

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The op itself, on meta where any operand is there."""
        tensors = list(self.tensors((args, kwargs)))
        if any(t.device.type == "meta" for t in tensors):
            if not all(t.device.type == "meta" for t in tensors):
                args, kwargs = _to_meta(args), _to_meta(kwargs)
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

    def constant(self, func: Any, args: Any, kwargs: Any) -> None:
        """Remember a number that the forward uses: one that changes with the widths would change the function."""
        values = (*args, *kwargs.values())
        numbers = [
            a.item() if isinstance(a, Tensor) and a.dim() == 0 and a.device.type != "meta" else a for a in values
        ]
        numbers = [float(a) for a in numbers if isinstance(a, (int, float)) and not isinstance(a, bool)]
        if numbers:
            found = [labels for labels in map(self.labels, self.tensors(values)) if labels is not None]
            nodes = [x.reshape(-1) for labels in found for x in labels.layers]
            self.constants += [(self.place(func), a) for a in numbers]
            self.constant_nodes += [np.concatenate(nodes) if nodes else np.zeros(0, np.int32)] * len(numbers)

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

    def by_heads(self, before: Layer, after: Layer, place: str) -> Layer:
        """A layer after a reshape; over heads only where it was split into heads that go as a whole."""
        if len(varying(after)) <= len(varying(before)):
            return after
        module = self.stack[-1] if self.stack else ""
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
        module = self.stack[-1] if self.stack else ""
        for t in operands:
            labels = self.labels(t)
            found = [Attended.of(module, x) for x in labels.layers] if labels is not None else []
            self.attended += [a for a in found if a is not None]
            for a in found:
                if a is not None and a.rows is not None:
                    self._head_attributes(module, DIM_ATTRIBUTES, a.rows[0])
            if labels is None and t.dim() == 4:
                self.attended.append(Attended(module, t.shape[1], t.shape[3], None))

    def attribute(self, parameter: Tensor, name: str, *layers: Layer) -> None:
        """A module attribute that follows the size of a layer."""
        owner = self.name_of(parameter)
        if owner is None or not layers:
            return
        module = self.stack[-1] if self.stack else ""
        held = self.by_name[module]._parameters.values()
        if not any(getattr(p, "_parameter_name", None) == owner for p in held):  # a tied one has several owners
            module = owner.rpartition(".")[0]
        if isinstance(getattr(self.by_name.get(module), name, None), (int, tuple)):
            self.attributes[module, name] = layers[0].reshape(-1)

    def norm_attribute(self, weight: Tensor | None, name: str, layer: Layer) -> None:
        """Like :meth:`attribute`, also for a norm without parameters (then it is the running module's)."""
        if weight is not None:
            self.attribute(weight, name, layer)
        elif self.stack and hasattr(self.by_name[self.stack[-1]], name):
            self.attributes[self.stack[-1], name] = layer.reshape(-1)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = list(self.tensors((args, kwargs)))
        statistic = statistics.follow(self, name, args, tensors) if self.statistics else None
        made = constants.follow(func, args, tensors)
        out = self._followed(func, args, kwargs)
        if made is not None:
            out._made = made
        if statistic is not None:
            out._statistic = statistic
        scales.note_leaks(self, name, tensors, kwargs, out)
        return out

    def _followed(self, func: Any, args: Any, kwargs: Any) -> Any:
        rule = RULES.get(func._schema.name)
        if rule is not None:
            return rule(self, func, args, kwargs)
        if not any(self.labels(t) is not None for t in self.tensors((args, kwargs))):
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
        if kind in FROZEN_CLASSES:
            for p in module.parameters():
                for layer in self.nodes.layers(self.name_of(p) or ""):
                    self.graph.freeze(layer, FROZEN_CLASSES[kind])

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.stack and id(module) in self.modules:
            self.stack.pop()

    def go(self, model: nn.Module, calls: Calls, kept: Mapping[tuple[str, int], np.ndarray] | None = None) -> None:
        """Run the calls; labels of the parameters are ``nodes``' (those of ``kept`` for a sliced model)."""
        with on_meta(model, self.nodes, kept), _hooks(self.enter, self.leave):
            for method, args, kwargs in calls:
                f = model if method == "forward" else getattr(model, method)
                with torch.inference_mode(), self:
                    out = f(*_inputs(args), **_inputs(kwargs))
                self.stack.clear()
                for t in _outputs(out, set()):
                    if getattr(t, "_statistic", None) is not None:
                        statistics.freeze(self, t._statistic)  # type: ignore[attr-defined]
                    labels = self.labels(t)
                    for layer in labels.layers if labels is not None else ():
                        self.graph.freeze(layer, "is an output of the model")
        scales.settle(self)


def _to_meta(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        if tree.device.type == "meta":
            return tree
        out = torch.empty_like(tree, device="meta")
        out._channel_labels = getattr(tree, "_channel_labels", None)  # type: ignore[attr-defined]
        return out
    if isinstance(tree, (list, tuple)):
        return type(tree)([_to_meta(x) for x in tree])
    if isinstance(tree, dict):
        return {k: _to_meta(v) for k, v in tree.items()}
    return tree


def _inputs(tree: Any) -> Any:
    """Floating-point inputs go to meta; ids, masks and numbers stay real."""
    if isinstance(tree, Tensor):
        return torch.empty(tree.shape, dtype=tree.dtype, device="meta") if tree.is_floating_point() else tree
    if isinstance(tree, (list, tuple)):
        return type(tree)([_inputs(x) for x in tree])
    if isinstance(tree, dict):
        return {k: _inputs(v) for k, v in tree.items()}
    return tree


def _outputs(tree: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors in whatever a forward returned (diffusers' outputs and distributions are plain objects)."""
    if isinstance(tree, Tensor):
        yield tree
        return
    if id(tree) in seen:
        return
    seen.add(id(tree))
    if isinstance(tree, dict):
        for x in tree.values():
            yield from _outputs(x, seen)
    elif isinstance(tree, (list, tuple)):
        for x in tree:
            yield from _outputs(x, seen)
    elif is_dataclass(tree) or hasattr(tree, "__dict__"):
        for x in vars(tree).values():
            yield from _outputs(x, seen)


@contextmanager
def _hooks(enter: Any, leave: Any) -> Iterator[None]:
    handles = [
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=False),
    ]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), like_a_device():
            # torch.compile'd submodules run uncompiled here, which is what we want
            warnings.filterwarnings("ignore", message=".*global hooks.*")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for h in handles:
            h.remove()


@contextmanager
def on_meta(model: nn.Module, nodes: Nodes, kept: Mapping[tuple[str, int], np.ndarray] | None = None) -> Iterator[None]:
    """The model with labelled meta tensors in place of its parameters and buffers, in eval mode; then as it was.

    Nothing of the weights is read or copied.
    """
    stand_ins: dict[int, Tensor] = {}
    undo: list[tuple[dict[str, Any], str, Any]] = []
    attributes = [(vars(m), vars(m).copy(), _contents(vars(m))) for m in [*model.modules(), *_plain_objects(model)]]
    try:
        for module in model.modules():
            module.training = False
            for table in (module._parameters, module._buffers):
                for key, t in table.items():
                    name = nodes.names.get(id(t)) if t is not None else None
                    if t is None or name is None:
                        continue
                    if id(t) not in stand_ins:
                        stand_ins[id(t)] = _stand_in(t, name, nodes, kept)
                    undo.append((table, key, t))
                    table[key] = stand_ins[id(t)]  # type: ignore[assignment]
        yield
    finally:
        for table, key, t in undo:
            table[key] = t
        for now, before, contents in attributes:  # forwards cache tables in attributes: theirs are of meta now
            _restore(now, before, contents)


def _plain_objects(model: nn.Module) -> list[Any]:
    """Objects of the model's own that aren't modules (a rotary embedder, say) and may cache tensors as well."""
    held = {id(v): v for m in model.modules() for v in vars(m).values() if hasattr(v, "__dict__")}
    ours = [v for v in held.values() if not isinstance(v, (nn.Module, Tensor, type, dict))]  # dicts: hooks, configs
    return [v for v in ours if not (callable(v) and hasattr(v, "__name__"))]  # functions cache nothing of theirs


def _contents(attributes: dict[str, Any]) -> dict[str, Any]:
    """Copies of the lists and dicts among the attributes."""
    return {k: v.copy() for k, v in attributes.items() if type(v) in (list, dict)}


def _restore(attributes: dict[str, Any], before: dict[str, Any], contents: dict[str, Any]) -> None:
    """Put back what a forward has set, in place where the attribute is a list or dict."""
    for key in attributes.keys() - before.keys():
        del attributes[key]
    attributes.update(before)
    for key, content in contents.items():
        before[key].clear()
        (before[key].update if isinstance(content, dict) else before[key].extend)(content)


def _stand_in(t: Tensor, name: str, nodes: Nodes, kept: Mapping[tuple[str, int], np.ndarray] | None) -> Tensor:
    shape = list(t.shape)
    for dim in range(len(shape)):
        if kept is not None and (name, dim) in kept:
            shape[dim] = kept[name, dim].size
    out: Tensor = torch.empty(shape, dtype=t.dtype, device="meta")
    if isinstance(t, nn.Parameter):
        out = nn.Parameter(out, requires_grad=False)
    layers = nodes.layers(name, kept)
    out._channel_labels = Labels(layers) if layers else None  # type: ignore[attr-defined]
    out._parameter_name = name  # type: ignore[attr-defined]
    return out
