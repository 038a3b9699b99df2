"""Models built from a config that isn't trusted: in bounded time and memory, with weights that are numbers."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from .errors import CheckpointError

# The largest models of diffusers and transformers have some ten thousand.
MOST_MODULES = 100_000


@contextmanager
def at_most_modules(most: int = MOST_MODULES) -> Iterator[None]:
    """Raise CheckpointError as soon as this thread has put more than ``most`` modules together in here."""
    thread, count = threading.get_ident(), 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > most:
            raise CheckpointError(f"the config asks for more than {most} modules: it is damaged, or not this model's")

    handle = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()


# Of a table of positions, which numpy makes before there is a model: four times the largest of diffusers, SD3.5's.
MOST_POSITIONS = 1 << 31


def check_positions(config: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a config asks for a table of positions that no memory holds."""

    def number(name: str) -> int:
        value = config.get(name)
        sizes = value if isinstance(value, (list, tuple)) else [value]
        return max((v for v in sizes if isinstance(v, int)), default=0)

    side = max(number("pos_embed_max_size"), number("sample_size") // max(1, number("patch_size")))
    if number("patch_size") and side**2 * number("num_attention_heads") * number("attention_head_dim") > MOST_POSITIONS:
        raise CheckpointError(f"the config asks for a table of {side}x{side} positions: it is damaged")


def check_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise CheckpointError, naming the tensor, for floating-point weights that are NaN or infinite."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.is_meta:
            x = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # eight bits have no isfinite
            if not bool(x.isfinite().all()):
                raise CheckpointError(f"{name} has NaN or infinite values: the training before went wrong")


def numbers_in(model: nn.Module) -> int:
    """Elements of all parameters and buffers."""
    return sum(t.numel() for t in [*model.parameters(), *model.buffers()])
