"""What forwards expect of a device, and meta doesn't have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def like_a_device() -> Iterator[None]:
    """Autocast does nothing on meta (labels have no dtype), and numbers that are put there stay real: they count."""
    init, tensor = torch.autocast.__init__, torch.tensor

    def autocast(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
        if device_type == "meta":
            init(self, "cpu", enabled=False)
        else:
            init(self, device_type, *args, **kwargs)

    def real(data: Any, **kwargs: Any) -> Tensor:
        device = kwargs.get("device")
        on_meta = device is not None and torch.device(device).type == "meta"
        return tensor(data, **({**kwargs, "device": "cpu"} if on_meta else kwargs))

    torch.autocast.__init__, torch.tensor = autocast, real  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.autocast.__init__, torch.tensor = init, tensor  # type: ignore[method-assign]
