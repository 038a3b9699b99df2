"""Which implementation serves an operation: decided here and nowhere else.

A backend is a module with an ``availability() -> str`` (``"ok"`` or the reason why it can't serve on this machine) and
the operation's function, called after all checks:
``channel_scores_(scores, thetas, grads, table, *, criterion, timestep_weights, zero_grad)`` or
``slice_channels_(tensors, slices)``. One that can tell beforehand what it will need also has
``slice_steps(tensors, slices)``, which takes all memory and returns calls that move the channels, or ``bind``, which
takes what ``channel_scores_`` takes and returns a function of the gradients, for calls with gradients at the same
addresses.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

logger = logging.getLogger("diffprune_fast")

ENVIRONMENT = "DIFFPRUNE_BACKEND"


class BackendError(RuntimeError):
    """A backend that was asked for by name can't serve."""


@dataclass(frozen=True)
class Backend:
    """module: relative to diffprune_fast. devices: device types that it serves; empty for all."""

    module: str
    devices: tuple[str, ...]


# In the order in which "auto" tries them.
BACKENDS: dict[str, dict[str, Backend]] = {
    "channel_scores": {
        "cpu": Backend("ops.cpu", ("cpu",)),
        "triton": Backend("kernels.channel_scores", ("cuda", "xpu")),
        "reference": Backend("ops.reference", ()),
    },
    "slice_channels": {
        "cpu": Backend("ops.cpu", ("cpu",)),
        "cuda": Backend("ops.cuda", ("cuda",)),
        "reference": Backend("ops.reference", ()),
    },
}

_said: set[tuple[str, str, str]] = set()


def backends() -> dict[str, str]:
    """Every ``"operation/backend"``, with ``"ok"`` or the reason why it can't serve on this machine.

    Returns:
        Name to ``"ok"`` or the reason.

    Example:
        >>> backends()["channel_scores/reference"]
        'ok'
    """
    return {f"{op}/{name}": availability(op, name) for op, table in BACKENDS.items() for name in table}


def availability(op: str, name: str) -> str:
    """``"ok"``, or why backend ``name`` can't serve operation ``op``."""
    return _load(BACKENDS[op][name])[1]


def choose(op: str, device: torch.device, asked: str = "auto") -> Callable[..., Any]:
    """The function that serves ``op`` on ``device``; ``asked`` and errors as for :func:`choose_module`."""
    return getattr(choose_module(op, device, asked), f"{op}_")


def choose_module(op: str, device: torch.device, asked: str = "auto") -> ModuleType:
    """The backend that serves ``op`` on ``device``.

    asked: ``"auto"`` or a backend's name. For ``"auto"`` the environment variable DIFFPRUNE_BACKEND may name one or
    several backends (comma-separated, the first that has this operation counts). Raises BackendError if a backend
    asked for by name can't serve.
    """
    table = BACKENDS[op]
    if asked == "auto":
        wanted = [name.strip() for name in os.environ.get(ENVIRONMENT, "auto").split(",")]
        known = {"auto", *(name for other in BACKENDS.values() for name in other)}
        for name in wanted:
            if name not in known:
                raise BackendError(f"{ENVIRONMENT}: backend {name!r} is unknown: use one of {', '.join(sorted(known))}")
        asked = next((name for name in wanted if name in table), "auto")
    if asked != "auto":
        return _named(op, device, asked)
    for name, backend in table.items():
        if backend.devices and device.type not in backend.devices:
            continue
        module, reason = _load(backend)
        if module is not None and reason == "ok":
            return module
        _say_once(op, name, reason)
    raise BackendError(f"no backend can serve {op} on {device}")


def _named(op: str, device: torch.device, name: str) -> ModuleType:
    table = BACKENDS[op]
    if name not in table:
        raise BackendError(f"{op} has no backend {name!r}: use one of auto, {', '.join(table)}")
    backend = table[name]
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if backend.devices and device.type not in backend.devices and not interpreted:
        raise BackendError(
            f"backend {name!r} serves {op} on {', '.join(backend.devices)}, but the tensors are on {device}"
        )
    module, reason = _load(backend)
    if module is None or reason != "ok":
        raise BackendError(f"backend {name!r} can't serve {op}: {reason}")
    return module


def _load(backend: Backend) -> tuple[ModuleType | None, str]:
    """The backend's module and its availability. Import errors are a reason, never a crash."""
    try:
        module = importlib.import_module(f"diffprune_fast.{backend.module}")
    except ImportError as error:
        return None, f"not installed ({error})"
    return module, module.availability() if hasattr(module, "availability") else "ok"


def _say_once(op: str, name: str, reason: str) -> None:
    if (op, name, reason) not in _said:
        _said.add((op, name, reason))
        logger.info("%s: backend %s can't serve: %s", op, name, reason)
