"""What a model hands out: all tensors of what its forward returned, and what else can be read once it is done."""

from __future__ import annotations

import dataclasses
import enum
from collections import deque
from collections.abc import Iterator, KeysView, Mapping, Set, ValuesView
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import TraceError

# They hold no tensors.
_NUMBERS = (
    str,
    bytes,
    int,
    float,
    complex,
    type,
    range,
    slice,
    enum.Enum,
    ModuleType,
    np.ndarray,
    np.generic,
    type(None),
)
_PLAIN = (*_NUMBERS, torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, torch.Generator)


_ITERABLE = (list, tuple, deque, Set, KeysView, ValuesView)


def outputs_in(tree: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """All tensors in whatever a forward returned (diffusers' outputs and distributions are plain objects).

    Raises TraceError for what can't be looked into: its channels would be taken for no outputs.
    """
    seen = set() if seen is None else seen
    if isinstance(tree, Tensor):
        yield tree
    elif not isinstance(tree, _PLAIN) and id(tree) not in seen:
        seen.add(id(tree))
        for x in _contents(tree):
            yield from outputs_in(x, seen)


def _contents(x: Any) -> list[Any]:
    """What a container or an object holds."""
    if isinstance(x, FunctionType):
        return [c.cell_contents for c in x.__closure__ or ()]
    if isinstance(x, (MethodType, BuiltinFunctionType)):
        return [x.__self__]
    if isinstance(x, partial):
        return [x.func, *x.args, *x.keywords.values()]
    found: list[Any] = []
    known = dataclasses.is_dataclass(x)
    if isinstance(x, Mapping):
        found, known = [*x.keys(), *x.values()], True
    elif isinstance(x, _ITERABLE):
        found, known = list(x), True
    if hasattr(x, "__dict__"):
        found, known = [*found, *vars(x).values()], True
    for base in type(x).__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(x, name):
                found, known = [*found, getattr(x, name)], True
    if not known:
        raise TraceError(
            f"the forward returns a {type(x).__name__}, in which outputs can't be looked for: return tensors, tuples, "
            "lists, dictionaries or plain objects of them"
        )
    return found
