"""A model's modules and tensors by name: what ``named_modules`` and its kin give, in one loop.

Theirs resume one generator per level for every module and ask each for its members: half a millisecond for a UNet's 290
modules, where a pruning needs them forty times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor, nn

T = TypeVar("T", bound=Tensor)


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """As ``dict(model.named_modules())``: every module once, by its first name, parents before their children."""
    if type(model).named_modules is not nn.Module.named_modules:
        return dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found[name] = module
        if module._modules:
            prefix = f"{name}." if name else ""
            waiting += [(prefix + key, child) for key, child in reversed(module._modules.items()) if child is not None]
    return found


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """As ``dict(model.named_parameters())``: every parameter once, by its first name."""
    if type(model).named_parameters is not nn.Module.named_parameters:  # FSDP has other names for them
        return dict(model.named_parameters())
    return _held(model, lambda module: module._parameters)


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """As ``dict(model.named_buffers())``: every buffer once, by its first name."""
    if type(model).named_buffers is not nn.Module.named_buffers:
        return dict(model.named_buffers())
    return _held(model, lambda module: module._buffers)


def _held(model: nn.Module, table: Callable[[nn.Module], Mapping[str, T | None]]) -> dict[str, T]:
    """Every tensor in the modules' tables once, by its first name."""
    found: dict[str, T] = {}
    seen: set[int] = set()
    for name, module in modules_of(model).items():
        prefix = f"{name}." if name else ""
        for key, tensor in table(module).items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                found[prefix + key] = tensor
    return found
