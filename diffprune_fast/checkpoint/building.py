"""Models built from a config that isn't trusted: in bounded time and memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
