"""A model and its inputs on meta, with labels beside them, and what forwards expect of a device there."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from .channels import Nodes
from .labels import Labels


@contextmanager
def like_a_device() -> Iterator[None]:
    """Autocast does nothing on meta (labels have no dtype), and numbers that are put there stay real: they count."""
    init, tensor, as_tensor = torch.autocast.__init__, torch.tensor, torch.as_tensor

    def autocast(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
        if device_type == "meta":
            init(self, "cpu", enabled=False)
        else:
            init(self, device_type, *args, **kwargs)

    def real(data: Any, **kwargs: Any) -> Tensor:
        device = kwargs.get("device")
        on_meta = device is not None and torch.device(device).type == "meta"
        return tensor(data, **({**kwargs, "device": "cpu"} if on_meta else kwargs))

    def real_as(data: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        return as_tensor(data, dtype, device) if isinstance(data, Tensor) else real(data, dtype=dtype, device=device)

    def real_new(self: Tensor, data: Any, **kwargs: Any) -> Tensor:
        return real(data, **{"dtype": self.dtype, "device": self.device, **kwargs})

    torch.autocast.__init__, torch.tensor = autocast, real  # type: ignore[method-assign, assignment]
    torch.as_tensor, Tensor.new_tensor = real_as, real_new  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.autocast.__init__, torch.tensor, torch.as_tensor = init, tensor, as_tensor  # type: ignore[method-assign]
        del Tensor.new_tensor  # ours hid the one that it inherits


def to_meta(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        if tree.device.type == "meta":
            return tree
        out = torch.empty_like(tree, device="meta")
        out._channel_labels = getattr(tree, "_channel_labels", None)  # type: ignore[attr-defined]
        return out
    if isinstance(tree, (list, tuple)):
        return type(tree)([to_meta(x) for x in tree])
    if isinstance(tree, dict):
        return {k: to_meta(v) for k, v in tree.items()}
    return tree


def inputs_on_meta(tree: Any) -> Any:
    """Floating-point inputs go to meta; ids, masks and numbers stay real."""
    if isinstance(tree, Tensor):
        return torch.empty(tree.shape, dtype=tree.dtype, device="meta") if tree.is_floating_point() else tree
    if isinstance(tree, (list, tuple)):
        return type(tree)([inputs_on_meta(x) for x in tree])
    if isinstance(tree, dict):
        return {k: inputs_on_meta(v) for k, v in tree.items()}
    return tree


def outputs_in(tree: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors in whatever a forward returned (diffusers' outputs and distributions are plain objects)."""
    if isinstance(tree, Tensor):
        yield tree
        return
    if id(tree) in seen:
        return
    seen.add(id(tree))
    if isinstance(tree, dict):
        for x in tree.values():
            yield from outputs_in(x, seen)
    elif isinstance(tree, (list, tuple)):
        for x in tree:
            yield from outputs_in(x, seen)
    elif is_dataclass(tree) or hasattr(tree, "__dict__"):
        for x in vars(tree).values():
            yield from outputs_in(x, seen)


@contextmanager
def hooked(enter: Any, leave: Any) -> Iterator[None]:
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
