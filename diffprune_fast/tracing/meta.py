"""A model and its inputs on meta, with labels beside them, and what forwards expect of a device there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ..module_tree import buffers_of, modules_of, parameters_of
from .channels import Channels
from .labels import Labels
from .notes import note_on, read_note
from .values import remember_input


class LikeADevice(TorchFunctionMode):
    """In a walk, tensors say that they are where the model is: a branch on that is the branch of any other call.

    And tensors that a forward makes of numbers of its own stay real where it asks for them on its device: they count.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _WHERE:
            return _WHERE[func](self.device)
        if func not in _MADE_OF_NUMBERS or (args and func is torch.as_tensor and isinstance(args[0], Tensor)):
            return func(*args, **kwargs)
        if func is Tensor.new_tensor:
            kwargs = {"dtype": args[0].dtype, **kwargs}
            args = args[1:]
        kwargs = {**dict(zip(("dtype", "device"), args[1:])), **kwargs}
        return torch.tensor(*args[:1], **{**kwargs, "device": "cpu"})


# Most of what modules have for attributes: it caches nothing.
_PLAIN = frozenset((bool, int, float, str, tuple, list, dict, OrderedDict, type(None)))


_MADE_OF_NUMBERS = frozenset((torch.tensor, torch.as_tensor, Tensor.new_tensor))


# What a tensor says of where it is, by the device that it is to be on.
_WHERE: dict[Any, Callable[[torch.device], Any]] = {
    Tensor.device.__get__: lambda device: device,
    Tensor.is_meta.__get__: lambda device: False,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: lambda device: device.type == "cpu",  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: lambda device: device.type == "cuda",  # type: ignore[attr-defined]
    Tensor.get_device: lambda device: -1 if device.type == "cpu" else device.index or 0,
}


def device_of(model: nn.Module) -> torch.device:
    """Where a model is; the CPU for one that is on meta itself."""
    held = (t.device for t in (*parameters_of(model).values(), *buffers_of(model).values()))
    return next((d for d in held if d.type != "meta"), torch.device("cpu"))


def to_meta(tree: Any) -> Any:
    """Tensors as they are, but on meta."""
    return tree_map_only(Tensor, lambda t: t if t.is_meta else _labelled_like(t), tree)


def _labelled_like(t: Tensor) -> Tensor:
    out = torch.empty_like(t, device="meta")
    note_on(out).labels = read_note(t).labels
    return out


def inputs_on_meta(tree: Any) -> Any:
    """Floating-point inputs go to meta, where a forward may still ask for their values; ids and masks stay real."""

    def moved(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        out = torch.empty(t.shape, dtype=t.dtype, device="meta")
        remember_input(out, t)
        return out

    return tree_map_only(Tensor, moved, tree)


@contextmanager
def module_hooks(model: nn.Module, enter: Any, leave: Any) -> Iterator[None]:
    """``enter`` before any other hook of every module, ``leave`` after its forward."""
    modules = modules_of(model).values()
    handles = [m.register_forward_pre_hook(enter, prepend=True) for m in modules]
    handles += [m.register_forward_hook(leave, prepend=True) for m in modules]
    try:
        yield
    finally:
        for h in handles:
            h.remove()


@contextmanager
def on_meta(
    model: nn.Module, channels: Channels, kept: Mapping[tuple[str, int], np.ndarray] | None = None
) -> Iterator[None]:
    """The model with labelled meta tensors in place of its parameters and buffers, in eval mode; then as it was.

    Nothing of the weights is read or copied.
    """
    stand_ins: dict[int, Tensor] = {}
    undo: list[tuple[dict[str, Any], str, Any]] = []
    with attributes_put_back(model):
        for module in modules_of(model).values():
            object.__setattr__(module, "training", False)  # nn.Module looks into all its tables first
            for table in (module._parameters, module._buffers):
                for key, t in table.items():
                    name = channels.names.get(id(t)) if t is not None else None
                    if t is None or name is None:
                        continue
                    if id(t) not in stand_ins:
                        stand_ins[id(t)] = _stand_in(t, name, channels, kept)
                    undo.append((table, key, t))
                    table[key] = stand_ins[id(t)]  # type: ignore[assignment]
        try:
            yield
        finally:
            for table, key, t in undo:
                table[key] = t


@contextmanager
def attributes_put_back(model: nn.Module) -> Iterator[None]:
    """What forwards set in attributes of the model is taken away: they cache tables there, of meta after a walk."""
    modules = list(modules_of(model).values())
    attributes = [(vars(m), vars(m).copy(), _contents(vars(m))) for m in [*modules, *_plain_objects(modules)]]
    try:
        yield
    finally:
        for now, before, contents in attributes:
            _restore(now, before, contents)


def _plain_objects(modules: Sequence[nn.Module]) -> list[Any]:
    """Objects of the model's own that aren't modules (a rotary embedder, say) and may cache tensors as well."""
    held = {id(v): v for m in modules for v in vars(m).values() if type(v) not in _PLAIN}
    held = {key: v for key, v in held.items() if hasattr(v, "__dict__")}
    ours = [v for v in held.values() if not isinstance(v, (nn.Module, Tensor, type, dict))]  # dicts: hooks, configs
    return [v for v in ours if not (callable(v) and hasattr(v, "__name__"))]  # functions cache nothing of theirs


def _contents(attributes: dict[str, Any]) -> dict[str, Any]:
    """Copies of the lists and dicts among the attributes."""
    return {k: v.copy() for k, v in attributes.items() if type(v) is dict or type(v) is list}


def _restore(attributes: dict[str, Any], before: dict[str, Any], contents: dict[str, Any]) -> None:
    """Put back what a forward has set, in place where the attribute is a list or dict."""
    for key in attributes.keys() - before.keys():
        del attributes[key]
    attributes.update(before)
    for key, content in contents.items():
        before[key].clear()
        (before[key].update if isinstance(content, dict) else before[key].extend)(content)


def _stand_in(t: Tensor, name: str, channels: Channels, kept: Mapping[tuple[str, int], np.ndarray] | None) -> Tensor:
    shape, is_parameter = list(t.shape), isinstance(t, nn.Parameter)
    if kept is not None:
        shape = [kept[name, dim].size if (name, dim) in kept else n for dim, n in enumerate(shape)]
    out: Tensor = torch.empty(shape, dtype=t.dtype, device="meta")
    if is_parameter:
        out = nn.Parameter(out, requires_grad=False)
    note, maps = note_on(out), channels.maps(name, kept)
    note.labels = Labels(maps, zero=is_parameter) if maps else None
    note.parameter = name
    return out
