"""What a forward calls, and what of its memory lives when: a walk that writes down every operation's tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_map

from ..architectures.inputs import ExampleInputs, calls_of
from ..plan.plan import Plan
from ..tracing.channels import Channels, units_of_channels
from ..tracing.graph import Graph
from ..tracing.labels import Labels, varying
from ..tracing.notes import read_note
from ..tracing.tracer import Tracer
from .widths import Shape, WidthNumbers, Widths

# They make new memory of what they read, in another order.
_COPIES = frozenset(("reshape", "contiguous", "flatten", "_unsafe_view", "_reshape_copy"))


@dataclass(frozen=True)
class Operation:
    """A call of PyTorch's: its tensors are :class:`Shape`. out: the first tensor that it gives."""

    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: Shape

    @property
    def name(self) -> str:
        return str(self.function)

    @property
    def shapes(self) -> list[Shape]:
        """Of the tensors that it reads."""
        return shapes_in((self.args, self.kwargs))


@dataclass(frozen=True)
class Recorded:
    """operations: in order, those that work on channels. made: the memory that operations take. live: at every
    operation, which of ``made`` are there. parameters: with buffers. others: how many operations follow no width."""

    widths: Widths
    operations: tuple[Operation, ...]
    made: tuple[Shape, ...]
    live: tuple[frozenset[int], ...]
    parameters: tuple[Shape, ...]
    others: int


def record(model: nn.Module, plan: Plan, example_inputs: ExampleInputs | None = None) -> Recorded:
    """One forward of the example inputs on ``meta``: nothing is computed, the model is untouched when it ends."""
    channels = Channels.of(model)
    numbers = WidthNumbers(plan, units_of_channels(plan, channels))
    recorder = _Recorder(model, channels, numbers)
    recorder.run(model, calls_of(model, example_inputs))
    parameters = []
    for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
        name = channels.names.get(id(t))
        maps = () if name is None else channels.maps(name)
        parameters.append(shape_of(t, Labels(maps), numbers))
    return Recorded(
        numbers.table(),
        tuple(recorder.operations),
        tuple(recorder.made),
        tuple(recorder.live),
        tuple(parameters),
        recorder.others,
    )


def shapes_in(tree: Any) -> list[Shape]:
    if isinstance(tree, Shape):
        return [tree]
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    return [s for x in tree for s in shapes_in(x)] if isinstance(tree, (list, tuple)) else []


def shape_of(t: Tensor, labels: Labels | None, numbers: WidthNumbers) -> Shape:
    """A tensor's shape. Of channels in rows (heads), every row loses equally many: its last dim is what shrinks."""
    widths = [-1] * t.dim()
    for label_map in labels.maps if labels is not None else ():
        dim = varying(label_map)[-1]
        if widths[dim] < 0:
            row = label_map.reshape(-1, label_map.shape[dim])[0] if dim == label_map.ndim - 1 else _row(label_map, dim)
            widths[dim] = numbers.number(np.ascontiguousarray(row, np.int32))
    order = tuple(sorted(range(t.dim()), key=t.stride, reverse=True))
    return Shape(tuple(t.shape), tuple(widths), order, str(t.dtype).removeprefix("torch."), t.element_size())


def _row(label_map: np.ndarray, dim: int) -> np.ndarray:
    return label_map[tuple([slice(None) if d == dim else 0 for d in range(label_map.ndim)])]


def _is_channels_last(t: Tensor) -> bool:
    return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


class _Recorder(Tracer):
    """Writes down what every operation of a walk reads and gives."""

    def __init__(self, model: nn.Module, channels: Channels, numbers: WidthNumbers) -> None:
        super().__init__(model, channels, Graph(channels.total))
        self.numbers = numbers
        self.operations: list[Operation] = []
        self.made: list[Shape] = []
        self.live: list[frozenset[int]] = []
        self.others = 0
        self._channels_last = any(_is_channels_last(p) for p in model.parameters())
        self._seen = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def _follow(self, func: Any, args: Any, kwargs: Any) -> Any:
        seen = self._seen
        tensors = list(self.walk.tensors((args, kwargs)))
        before = tree_map(self._shape, (args, kwargs))
        held = {t.untyped_storage()._cdata for t in tensors}
        del tensors
        out = super()._follow(func, args, kwargs)
        if self._seen > seen:  # it was taken apart: its parts stand for it
            return out
        outs = list(self.walk.tensors(out))
        new = [t for t in outs if t.untyped_storage()._cdata not in held]
        if not (new or func._schema.is_mutable):
            return out
        self._seen += 1
        if new and self.walk.stack:  # what is made before the model runs are its inputs
            self._note_memory(new)
        self._note_operation(func, outs, *before)
        return out

    def _shape(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        found = shape_of(x, read_note(x).labels, self.numbers)
        if self._channels_last and x.dim() == 4 and max(found.widths[2:]) < 0:  # on meta all is contiguous
            return replace(found, order=(0, 2, 3, 1))
        return found

    def _note_operation(self, func: Any, outs: Sequence[Tensor], args: Any, kwargs: Any) -> None:
        shapes = shapes_in((args, kwargs))
        if not outs or not any(s.follows for s in shapes):
            self.others += 1
            return
        if func.overloadpacket.__name__ in _COPIES:
            func, args = torch.ops.aten.clone.default, (shapes[0],)
            kwargs = {"memory_format": torch.contiguous_format}
        self.operations.append(Operation(func, tuple(args), dict(kwargs), self._shape(outs[0])))

    def _note_memory(self, new: Sequence[Tensor]) -> None:
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        for t in new:
            storage = t.untyped_storage()
            if storage._cdata not in self._alive:
                self._alive[storage._cdata] = StorageWeakRef(storage), len(self.made)
                self.made.append(self._shape(t))
        self.live.append(frozenset(number for _, number in self._alive.values()))
