"""What is checked of a model before it is used."""

from __future__ import annotations

import torch
from torch import nn


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
