"""What other libraries hang on a model: adapters, quantised weights. Their layers can't be sliced, or not be saved."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from ..module_tree import modules_of, parameters_of


def adapters(model: nn.Module) -> list[str]:
    """The layers that carry adapters of peft (LoRA and others), by name."""
    tuners: Any = sys.modules.get("peft.tuners.tuners_utils")  # not imported: then nobody can have attached any
    if tuners is None:
        return []
    return [name for name, m in modules_of(model).items() if isinstance(m, tuners.BaseTunerLayer)]


def check_attached(model: nn.Module) -> None:
    """Raises ValueError for a model with adapters, or with quantised weights, and says what to do first."""
    layers = adapters(model)
    if layers:
        raise ValueError(
            f"{len(layers)} layers have adapters ({layers[0]}): pruned with them the model could not be saved. Put "
            "them into the weights and take them off first (fuse_lora and unload_lora, or peft's merge_and_unload), or "
            "prune first and train adapters after"
        )
    for name, module in modules_of(model).items():
        if type(module).__module__.startswith(("torch.ao.nn.quantized", "bitsandbytes", "optimum.quanto")):
            raise _quantised(f"{name} is a {type(module).__module__}.{type(module).__name__}")
    for name, p in parameters_of(model).items():
        kind = type(p.data)
        if not (p.is_floating_point() or p.is_complex()) or kind.__module__.startswith("torchao"):
            raise _quantised(f"{name} is {kind.__name__ if kind is not torch.Tensor else p.dtype}")


def _quantised(what: str) -> ValueError:
    return ValueError(f"quantised weights can't be pruned ({what}): prune the model as it was before, then quantise")
