"""One forward of the dense model: what the layers that will lose inputs give, at positions drawn once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..objective.randomness import generator_for
from .calibration import POSITIONS, Calibration
from .consumers import Consumer
from .patches import positions_of, values_at


@dataclass(frozen=True)
class Target:
    """What a layer should answer (or, where ``of_inputs``, be given).

    shape: the sizes of all places. rows: ``(n,)`` sorted flat positions of some of them. values: ``(n, channels)`` on
    the host.
    """

    shape: tuple[int, ...]
    rows: Tensor
    values: Tensor
    of_inputs: bool = False


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else kwargs["input"]


@contextmanager
def watched(
    model: nn.Module, layers: Sequence[Consumer], see: Callable[[Consumer, nn.Module, Tensor, Tensor], None]
) -> Iterator[None]:
    """While inside, ``see(layer, module, input, output)`` at the first call of every layer."""
    modules = dict(model.named_modules())
    seen: set[int] = set()

    def hook(layer: Consumer) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            if layer.place not in seen:
                seen.add(layer.place)
                with torch.autocast(output.device.type, enabled=False):
                    see(layer, module, first_input(args, kwargs), output)

        return look

    handles: list[Any] = []
    try:
        for layer in layers:
            # before the user's own hooks: what the layer itself gives is wanted
            handle = modules[layer.name].register_forward_hook(hook(layer), prepend=True, with_kwargs=True)
            handles.append(handle)
        yield
    finally:
        for handle in handles:
            handle.remove()


def record(
    dense: nn.Module,
    layers: Sequence[Consumer],
    calibration: Calibration,
    *,
    rows: Mapping[str, int],
    of_inputs: frozenset[str],
    seed: int,
    half: bool,
) -> dict[str, Target]:
    """Run the dense model and keep what every layer gives, by the layer's name; layers that didn't run are missing.

    rows: how many positions each layer's targets are taken at, at most, all ranks together. of_inputs: layers whose
    inputs are kept in place of their outputs. half: in bfloat16.
    """
    found: dict[str, Target] = {}

    def see(layer: Consumer, module: nn.Module, x: Tensor, y: Tensor) -> None:
        inputs = layer.name in of_inputs
        z = x if inputs else y
        shape = _places(module, z) if inputs else positions_of(module, x)
        at = _drawn(shape, rows[layer.name], calibration, seed, layer.place)
        values = values_at(module, z, at, None if inputs else layer.outputs)
        if layer.factor is not None and not inputs:
            values = values * layer.factor.to(values.device, values.dtype)
        dtype = torch.bfloat16 if half and values.dtype != torch.float16 else values.dtype
        found[layer.name] = Target(shape, at, values.to("cpu", dtype), inputs)

    with watched(dense, layers, see):
        calibration.run(dense)
    return found


def _places(module: nn.Module, x: Tensor) -> tuple[int, ...]:
    """The sizes of all dims of a convolution's input but the channels'."""
    sample = x.ndim == len(module.kernel_size) + 1  # type: ignore[arg-type]
    return (1, *x.shape[1:]) if sample else (x.shape[0], *x.shape[2:])


def _drawn(shape: tuple[int, ...], most: int, calibration: Calibration, seed: int, place: int) -> Tensor:
    """Sorted flat positions in ``shape``: all, or one from each of ``most`` equal strips of all ranks' positions."""
    total = int(torch.Size(shape).numel())
    mine = calibration.stop - calibration.start
    per_sample = total // mine if shape and shape[0] % mine == 0 else None
    everything = total if per_sample is None else per_sample * calibration.samples
    if everything <= most or total == 0:
        return torch.arange(total)
    generator = generator_for(seed, POSITIONS, place)
    where = (torch.arange(most) + torch.rand(most, generator=generator, dtype=torch.float64)) * (everything / most)
    where = torch.unique_consecutive(where.long().clamp(max=everything - 1))
    if per_sample is None:
        return where
    first, last = calibration.start * per_sample, calibration.stop * per_sample
    return where[(where >= first) & (where < last)] - first
