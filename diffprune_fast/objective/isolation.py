"""A model that is used and left as it was: its mode, its gradients, its wrappers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def stand_ins(model: nn.Module, names: tuple[str, ...]) -> Iterator[Mapping[str, nn.Parameter]]:
    """Put a stand-in that shares its memory in the place of every parameter, and the model into evaluation mode.

    A stand-in has its own ``.grad``, hooks and ``requires_grad`` (True for ``names``, False for all others), so that
    the user's gradients, gradient hooks (an optimiser step in backward, DistributedDataParallel's reducer) and frozen
    parameters are out of reach. On the way out, also by an error, the parameters and training flags are as before.
    """
    wanted = set(names)
    originals: list[tuple[nn.Module, str, nn.Parameter]] = [
        (module, key, p) for module in model.modules() for key, p in module._parameters.items() if p is not None
    ]
    training = [(module, module.training) for module in model.modules()]
    by_identity: dict[int, nn.Parameter] = {}
    found: dict[str, nn.Parameter] = {}
    for name, p in model.named_parameters():
        by_identity[id(p)] = nn.Parameter(p.detach(), requires_grad=name in wanted)
        if name in wanted:
            found[name] = by_identity[id(p)]
    try:
        for module, key, p in originals:
            module._parameters[key] = by_identity[id(p)]
        for module, _ in training:
            module.training = False
        yield found
    finally:
        for module, key, p in originals:
            module._parameters[key] = p
        for module, flag in training:
            module.training = flag


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel, torch.compile or a PeftModel.

    The plan has its parameter names.
    """
    inner = getattr(model, "_orig_mod", None)
    if isinstance(inner, nn.Module):
        return unwrapped(inner)
    # peft's wrapper hands its calls on to a model that has the adapters in it.
    base: Any = getattr(model, "get_base_model", None)
    if hasattr(model, "peft_config") and callable(base):
        return unwrapped(base())
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return unwrapped(model.module)
    return model


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[nn.Module]:
    """The model in training or evaluation mode; every submodule gets back its own afterwards, also after an error."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield model
    finally:
        for module, mode in before.items():
            module.training = mode
