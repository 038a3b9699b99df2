"""What rules may call: labels of tensors, the graph, costs and attributes that follow a width."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.attributes import DIM_ATTRIBUTES, HEAD_ATTRIBUTES
from ..module_tree import modules_of
from .channels import Channels
from .graph import Graph
from .labels import LabelMap, LabelMaps, Labels, varying
from .meta import device_of, to_meta
from .notes import note_on, read_note
from .records import Attended, CostTerm, ScaleTerm, Step, place_of
from .values import Writes, computed

# Ids and masks up to this size keep their values, which a forward may ask for (transformers' attention masks).
_FEW = 65536

# Most of what isn't a tensor among an operation's arguments.
_PLAIN = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format))


def _on(device: torch.device, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """An operation's arguments with another device in place of the one that they name."""
    return (
        tuple([device if isinstance(a, torch.device) else a for a in args]),
        {n: device if isinstance(a, torch.device) else a for n, a in kwargs.items()},
    )


def _collect(values: Iterable[Any], found: list[Tensor]) -> None:
    for x in values:
        if type(x) in _PLAIN:
            continue
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            _collect(x, found)
        elif isinstance(x, dict):
            _collect(x.values(), found)


class Walk:
    """What a walk has found so far, and what rules may do with it; the tracer calls the rules."""

    def __init__(self, model: nn.Module, channels: Channels, graph: Graph) -> None:
        self.channels = channels
        self.graph = graph
        self.device = device_of(model)
        self.writes = Writes()
        self.costs: list[CostTerm] = []
        self.scales: list[ScaleTerm] = []
        self.other_uses: list[Labels] = []
        self.gains: dict[str, str] = {}  # what holds the norms of another parameter's rows, and which
        self.read: set[str] = set()  # parameters that anything else has read
        self.statistics = 0
        self.repeats = False  # another walk of the model is known to take the same steps
        self.attributes: dict[tuple[str, str], LabelMap] = {}
        self.scale_attributes: dict[tuple[str, str], LabelMap] = {}
        self.attended: list[Attended] = []
        self.steps: list[Step] = []
        self.by_name = modules_of(model)
        self.modules = {id(m): n for n, m in self.by_name.items()}
        self.stack: list[str] = []
        self.notes: list[str] = []  # what the user should know of this model
        self.failed: tuple[str, tuple[Any, ...]] | None = None  # an operation's place and arguments

    def is_zero(self, t: Tensor) -> bool:
        """Whether a tensor is zero in the channels that go, whatever was written into the memory that it lies in."""
        labels = self.labels(t)
        return labels is not None and labels.zero and self.writes.labels_in(t) is labels

    def labels(self, t: Any) -> Labels | None:
        return read_note(t).labels

    def maps(self, t: Any) -> LabelMaps:
        """A tensor's label maps, none for one without labels."""
        labels = read_note(t).labels
        return labels.maps if labels is not None else ()

    def label(self, t: Tensor, labels: Labels | None) -> None:
        note_on(t).labels = labels if labels is not None and labels.maps else None

    def name_of(self, t: Any) -> str | None:
        """The name of the parameter or buffer that a tensor is."""
        return read_note(t).parameter

    @property
    def module(self) -> str:
        """The name of the module that is running."""
        return self.stack[-1] if self.stack else ""

    def place(self, func: Any) -> str:
        return place_of(self.module, func)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The op itself, on meta where any operand is there."""
        tensors = self.tensors((args, kwargs))
        given = args, kwargs
        if func._schema.is_mutable:
            self.writes.note(func, args, kwargs, tensors, len(self.steps))
        if any(self.writes.without_values(t) for t in tensors):
            if not all(t.is_meta for t in tensors):
                args, kwargs = to_meta(args), to_meta(kwargs)
            args, kwargs = _on(torch.device("meta"), args, kwargs)
        elif tensors:
            args, kwargs = _on(tensors[0].device, args, kwargs)  # numbers and ids keep their values
        elif kwargs.get("device") == self.device:
            return self._made(func, args, kwargs)
        try:
            return func(*args, **kwargs)
        except Exception:
            real = computed(func, *given, self.writes)
            if real is not None:
                return real
            self.failed = self.place(func), args
            raise

    def _made(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A tensor that the forward makes on the model's device: on meta, unless it is a few ids or a small mask."""
        out = func(*args, **{**kwargs, "device": torch.device("meta")})
        numbers = isinstance(out, Tensor) and (out.is_floating_point() or out.is_complex() or out.numel() > _FEW)
        return out if numbers else func(*args, **{**kwargs, "device": torch.device("cpu")})

    def tensors(self, tree: Any) -> list[Tensor]:
        """All tensors in lists, tuples and dicts, in order."""
        found: list[Tensor] = []
        _collect((tree,), found)
        return found

    def functional(self, func: Any) -> Callable[..., Any]:
        """The out-of-place form of an op, to run it on labels."""
        name = func.overloadpacket.__name__
        if name.endswith("_") and hasattr(torch.Tensor, name[:-1]):
            return getattr(torch.Tensor, name[:-1])
        return func

    def freeze_dims(self, t: Tensor, dims: Sequence[int], reason: str) -> None:
        for label_map in self.maps(t):
            if any(label_map.shape[d] > 1 for d in dims):
                self.graph.freeze(label_map, reason)

    def cost(self, place: str, total: int, maps: LabelMaps, attention: bool = False) -> None:
        """``total`` multiply-accumulates, proportional to the sizes of the labelled dims."""
        used: list[LabelMap] = []
        dims: set[int] = set()
        for x in sorted(maps, key=lambda y: -y.size):
            mine = set(varying(x)) if x.ndim > 1 else {-1 - len(used)}
            if not mine & dims:
                used.append(x)
                dims |= mine
                total //= x.size
        self.costs.append(CostTerm(place, total, tuple(used), attention))

    def keep_heads_whole(self, before: LabelMap, after: LabelMap, place: str) -> LabelMap:
        """A label map after a reshape; over heads only where it was split into heads that go as a whole."""
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

    def _head_attributes(self, module: str, names: Sequence[str], label_map: LabelMap) -> bool:
        """Note the module's attributes, of these names, that hold the size of a label map; whether there are any."""
        held = vars(self.by_name[module])
        found = [a for a in names if type(held.get(a)) is int and held[a] == label_map.size]
        for name in found:
            self.attributes[module, name] = label_map
        return bool(found)

    def attend(self, *operands: Tensor) -> None:
        """Note what an attention product brings together: heads, dims, channels."""
        for t in operands:
            for label_map in self.maps(t):
                found = Attended.of(self.module, label_map)
                if found is not None and found.rows is not None:
                    self.attended.append(found)
                    self._head_attributes(self.module, DIM_ATTRIBUTES, found.rows[0])
            if not self.maps(t) and t.dim() == 4:
                self.attended.append(Attended(self.module, t.shape[1], t.shape[3], None))

    def attribute(self, parameter: Tensor, name: str, *maps: LabelMap) -> None:
        """A module attribute that follows the size of a label map."""
        owner = self.name_of(parameter)
        if not maps:
            return
        module = self.module
        if owner is None:  # a weight that was computed, of the module that runs
            if getattr(self.by_name[module], name, None) == maps[0].size:
                self.attributes[module, name] = maps[0].reshape(-1)
            return
        held = self.by_name[module]._parameters
        if owner not in [self.name_of(p) for p in held.values()]:  # a tied one has several owners
            module = owner.rpartition(".")[0]
        if isinstance(getattr(self.by_name.get(module), name, None), (int, tuple)):
            self.attributes[module, name] = maps[0].reshape(-1)

    def norm_attribute(self, weight: Tensor | None, name: str, label_map: LabelMap) -> None:
        """Like :meth:`attribute`, also for a norm without parameters (then it is the running module's)."""
        if weight is not None:
            self.attribute(weight, name, label_map)
        elif self.stack and hasattr(self.by_name[self.module], name):
            self.attributes[self.module, name] = label_map.reshape(-1)
