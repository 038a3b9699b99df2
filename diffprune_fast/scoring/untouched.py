"""Scoring a model without touching it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
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


@contextmanager
def own_randomness(seed: int, loader: object = None) -> Iterator[None]:
    """Seed every global generator that a loader or a model may draw from, and give all of them back as they were.

    loader: its own generators (a DataLoader's, its sampler's) are given back too, so that the next call sees the same.
    """
    owners = (loader, getattr(loader, "sampler", None))
    own = [g for g in (getattr(o, "generator", None) for o in owners) if isinstance(g, torch.Generator)]
    states = [g.get_state() for g in own]
    python, numpy_state, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    # Asking CUDA for its state would start it where nobody uses it.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - what datasets draw from
        torch.default_generator.manual_seed(seed)
        if cuda is not None:
            torch.cuda.manual_seed_all(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(cpu)
        for generator, state in zip(own, states):
            generator.set_state(state)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def generator_for(seed: int, *place: int) -> torch.Generator:
    """A CPU generator of its own for every place in the work, so that no number depends on who draws it or when."""
    words = np.random.SeedSequence([seed % 2**63, *place]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]) % 2**63)


def check_weights(model: nn.Module) -> torch.device:
    """The one device that the model's parameters are on.

    Raises ValueError, naming the parameter, for NaN or infinite weights, weights on ``meta`` or on several devices.
    """
    device: torch.device | None = None
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type == "meta":
            raise ValueError(f"{name} is on the meta device: load the weights before scoring")
        if isinstance(tensor, nn.Parameter):
            if device is not None and tensor.device != device:
                raise ValueError(f"{name} is on {tensor.device}, others are on {device}: move the model to one device")
            device = tensor.device
        if tensor.is_floating_point():
            # A buffer may be infinite on purpose (attention masks).
            bad = ~tensor.isfinite() if isinstance(tensor, nn.Parameter) else tensor.isnan()
            if bool(bad.any()):
                raise ValueError(f"{name} has {int(bad.sum())} NaN or infinite values: the model can't be scored")
    if device is None:
        raise ValueError(f"{type(model).__name__} has no parameters to score")
    return device


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel or torch.compile, whose parameter names the plan has."""
    inner = getattr(model, "_orig_mod", None)
    if isinstance(inner, nn.Module):
        return unwrapped(inner)
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return unwrapped(model.module)
    return model
