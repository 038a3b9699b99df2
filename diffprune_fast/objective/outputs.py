"""What a model gave, whatever called it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .nested import tensors_in

# Objectives that call methods or parts of the model in place of its forward.
CALLS_PARTS = ("reconstruction", "loss_fn")


@contextmanager
def outputs_seen(model: nn.Module, kind: str, see: Callable[[list[Tensor]], None]) -> Iterator[None]:
    """While inside, ``see(tensors)`` after every call of ``model``, with the floating-point tensors of what it gave.

    kind: the objective's. Where that calls parts of the model in place of its forward, the calls of parts that no other
    part has called are seen.
    """
    depth = 0

    def enter(*_: object) -> None:
        nonlocal depth
        depth += 1

    def leave(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal depth
        depth -= 1
        found = [y for y in tensors_in(output) if y.is_floating_point() and y.numel()]
        if depth == 0 and found:
            see(found)

    handles = []
    try:
        for module in model.modules() if kind in CALLS_PARTS else [model]:
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        yield
    finally:
        for handle in handles:
            handle.remove()
