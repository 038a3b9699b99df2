"""How much memory the activations of a forward take at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..objective.nested import tensors_in

# Others may have no storage of their own.
PLAIN = (Tensor, nn.Parameter)


class _Live(TorchDispatchMode):
    """Adds up the storages that operations make, and takes away those whose last tensor has gone."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._tensors: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {_storage(x) for x in tensors_in([args, kwargs]) if type(x) in PLAIN}
        for x in tensors_in([found]):
            # Weights and their views are no activations.
            if type(x) in PLAIN and (_storage(x) in self._tensors or _storage(x) not in given):
                self._add(x)
        return found

    def _add(self, x: Tensor) -> None:
        key, size = _storage(x), x.untyped_storage().nbytes()
        if not self._tensors.get(key):
            self._tensors[key] = 0
            self.now += size
            self.peak = max(self.peak, self.now)
        self._tensors[key] += 1
        weakref.finalize(x, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._tensors[key] -= 1
        if not self._tensors[key]:
            del self._tensors[key]
            self.now -= size


def live_bytes(call: Callable[[], object]) -> int:
    """The most that the tensors which ``call`` makes take at a time; what operations use inside isn't seen."""
    with _Live() as live:
        call()
    return live.peak


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
