"""Layers whose outputs are added to a residual stream: what the stream should be after them is the better target.

Seen on one sample, by numbers alone: ``z - y = s`` of a layer's output ``y``, where ``s`` goes into or comes out of
some module before the layer runs, and ``z`` after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .calibration import Calibration
from .consumers import Consumer
from .patches import NORMS, channel_dim

# Where sums are looked for: so many inputs and outputs of modules after the layer, at so many positions.
NEAR, PROBES = 16, 24


@dataclass(frozen=True)
class Point:
    """What goes into, or comes out of, a module at its first call; channels along ``dim``."""

    module: str
    side: Literal["input", "output"]
    dim: int


@dataclass(frozen=True)
class Stream:
    """before: the stream as a layer finds it. after: with the layer's output added."""

    before: Point
    after: Point


@contextmanager
def observed(
    model: nn.Module, see: Callable[[str, str, Tensor], None], paths: Sequence[str] | None = None
) -> Iterator[None]:
    """While inside, ``see(module, side, tensor)`` at the first call of every module (or of those named)."""
    modules = dict(model.named_modules())
    seen: set[tuple[str, str]] = set()
    handles: list[Any] = []

    def once(path: str, side: str, value: Any) -> None:
        if (path, side) not in seen:
            seen.add((path, side))
            value = value[0] if isinstance(value, (tuple, list)) and value else value
            value = getattr(value, "sample", value)
            if isinstance(value, Tensor):
                see(path, side, value)

    def before(path: str) -> Callable[..., None]:
        return lambda module, args, kwargs: once(path, "input", args or tuple(kwargs.values()))

    def after(path: str) -> Callable[..., None]:
        return lambda module, args, kwargs, output: once(path, "output", output)

    try:
        for path in modules if paths is None else paths:
            handles.append(modules[path].register_forward_pre_hook(before(path), with_kwargs=True))
            handles.append(modules[path].register_forward_hook(after(path), prepend=True, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def streams(
    dense: nn.Module, pruned: nn.Module, layers: Sequence[Consumer], calibration: Calibration
) -> dict[str, Stream]:
    """The layers whose output is added to a stream, by the same sum in both models."""
    found = _sums(dense, layers, calibration)
    there = _events(pruned, calibration)
    position = {(path, side): i for i, (path, side, _) in enumerate(there)}
    modules = dict(pruned.named_modules())
    confirmed = {}
    for name, stream in found.items():
        places = [position.get((p.module, p.side)) for p in (stream.before, stream.after)]
        y = position.get((name, "output"))
        if y is None or None in places:
            continue
        s, z = (_probes(there[i][2], p.dim) for i, p in zip(places, (stream.before, stream.after)))  # type: ignore[index]
        if _adds_up(s, _probes(there[y][2], channel_dim(modules[name])), z):
            confirmed[name] = stream
    return confirmed


def _events(model: nn.Module, calibration: Calibration) -> list[tuple[str, str, Tensor]]:
    found: list[tuple[str, str, Tensor]] = []
    with observed(model, lambda path, side, x: found.append((path, side, x))):
        calibration.one(model)
    return found


@dataclass(frozen=True)
class _Seen:
    """A tensor of one event, with channels along ``dim``: some of its rows, and a few of their numbers by themselves,
    which tell most sums from others at once."""

    point: Point
    shape: tuple[int, ...]
    rows: Tensor
    few: tuple[float, ...]

    @classmethod
    def of(cls, path: str, side: Any, x: Tensor, dim: int) -> _Seen:
        rows = _probes(x, dim)
        flat = rows.reshape(-1)
        few = flat[torch.linspace(0, max(len(flat) - 1, 0), min(3, len(flat)), device=flat.device).long()]
        return cls(Point(path, side, dim), (x.numel(), *rows.shape), rows, tuple(few.double().tolist()))


def _sums(model: nn.Module, layers: Sequence[Consumer], calibration: Calibration) -> dict[str, Stream]:
    events = _events(model, calibration)
    order = {(path, side): i for i, (path, side, _) in enumerate(events)}
    seen = [[_Seen.of(*event, d) for d in (1, -1) if event[2].ndim > 1] for event in events]
    modules = dict(model.named_modules())
    found: dict[str, Stream] = {}
    for layer in layers:
        at = order.get((layer.name, "output"))
        if at is None or layer.factor is not None or isinstance(modules[layer.name], NORMS):
            continue
        y = _Seen.of(*events[at], channel_dim(modules[layer.name]))
        after = [z for zs in seen[at + 1 : at + NEAR] for z in zs if z.shape == y.shape and z.few != y.few]
        before = [s for ss in reversed(seen[:at]) for s in ss if s.shape == y.shape]
        tolerance = 4 * torch.finfo(y.rows.dtype).eps
        for z, s in ((z, s) for z in after for s in before):
            near = all(
                abs(a + b - c) <= tolerance * max(abs(a), abs(b), abs(c)) for a, b, c in zip(s.few, y.few, z.few)
            )
            if near and _adds_up(s.rows, y.rows, z.rows):
                found[layer.name] = Stream(s.point, z.point)
                break
    return found


def _probes(x: Tensor, dim: int) -> Tensor:
    """``(at most PROBES, channels)``: some rows of a tensor."""
    x = x.movedim(dim, -1)
    total = int(torch.Size(x.shape[:-1]).numel())
    at = torch.linspace(0, max(total - 1, 0), min(PROBES, total), device=x.device).long()
    return x[torch.unravel_index(at, x.shape[:-1])].clone() if x.ndim > 1 else x[None].clone()


def _adds_up(s: Tensor, y: Tensor, z: Tensor) -> bool:
    """``s + y = z``, where ``y`` is large enough for that to mean something."""
    if not s.shape == y.shape == z.shape or not z.is_floating_point():
        return False
    wide = [x.double() if x.device.type != "mps" else x.float() for x in (s, y, z)]
    size = max(x.abs().amax().item() for x in wide)
    tolerance = 2 * torch.finfo(z.dtype).eps * size
    error = (wide[0] + wide[1] - wide[2]).abs().amax().item()
    return error <= tolerance < 0.1 * wide[1].abs().amax().item()


def points(found: Mapping[str, Stream]) -> dict[tuple[str, str], list[tuple[str, Point]]]:
    """The layers that want each ``after``."""
    wanted: dict[tuple[str, str], list[tuple[str, Point]]] = {}
    for name, stream in found.items():
        wanted.setdefault((stream.after.module, stream.after.side), []).append((name, stream.after))
    return wanted
