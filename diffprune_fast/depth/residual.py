"""What a module does by itself when its weights are zero: a residual block hands its input on, bit for bit."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..plan.blocks import Returns
from ..pruned.held_tensors import copied

# Products, and the place of what is added to them (2: after the factors, where it is given).
_PRODUCTS = {"mm": 2, "bmm": 2, "linear": 2, "convolution": 2, "addmm": 0, "baddbmm": 0}


class _Unlike(Exception):
    """The output isn't made of inputs."""


def find_returns(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Returns:
    """Which of its inputs ``module`` returns when its branch contributes nothing.

    args, kwargs: as the model calls it; floating-point tensors count by their shape alone. The module runs with zeros
    for weights and random inputs, and every tensor that it returns must be one of its arguments, bit for bit. That is
    so where the output is ``input + f(input)`` and f ends in a layer with weights, whatever the class.

    None: it is no residual block (or can't be run by itself). The module isn't changed.
    """
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        generator = torch.Generator().manual_seed(0)
        given = {name: _real(value, generator) for name, value in bound.arguments.items()}
        twin = _with_zeros(module)
        plain = inspect.BoundArguments(bound.signature, given)
        with torch.inference_mode(), warnings.catch_warnings(), _ZeroProducts():
            warnings.simplefilter("ignore")
            out = twin(*plain.args, **plain.kwargs)
        returns = _matched(out, {n: v for n, v in given.items() if isinstance(v, Tensor)})
    except _Unlike:
        return None
    except Exception:  # whatever a module makes of being run without the rest of its model
        return None
    return returns


def _matched(out: Any, given: Mapping[str, Tensor]) -> Returns:
    if isinstance(out, Tensor):
        for name, value in given.items():
            if out.shape == value.shape and out.is_floating_point() and torch.equal(out, value):
                return name
        raise _Unlike
    if isinstance(out, (tuple, list)) and not hasattr(out, "_fields"):
        found: list[Any] = [None if x is None else _matched(x, given) for x in out]
        if any(x is not None for x in found):
            return found
    raise _Unlike


def _with_zeros(module: nn.Module) -> nn.Module:
    """A copy in single precision on the CPU, its weights zero; hooks are left behind."""
    memo: dict[int, Any] = {}
    for p in module.parameters():
        dtype = torch.float32 if p.is_floating_point() else p.dtype
        memo[id(p)] = nn.Parameter(torch.zeros(p.shape, dtype=dtype), requires_grad=False)
    for b in module.buffers():
        dtype = torch.float32 if b.is_floating_point() else b.dtype
        memo[id(b)] = torch.zeros(b.shape, dtype=dtype) if b.is_meta else b.detach().to("cpu", dtype)
    twin = copied(module, memo).eval()
    for part in twin.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return twin


def _real(value: Any, generator: torch.Generator) -> Any:
    """Random numbers for floating-point tensors; true masks and zero indices for what has no values."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            return torch.randn(value.shape, generator=generator)
        return torch.ones(value.shape, dtype=value.dtype) if value.is_meta else value.cpu()
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)([_real(v, generator) for v in value])
    if isinstance(value, dict):
        return {k: _real(v, generator) for k, v in value.items()}
    return value


class _ZeroProducts(TorchDispatchMode):
    """Leaves out products with a factor of zeros: without them, a block of billions of operations takes moments."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._vanishes(func.overloadpacket.__name__, args):
            return func(*args, **kwargs)
        out = func(*[a.to("meta") if isinstance(a, Tensor) else a for a in args], **kwargs)
        return _zeros_like(out)

    @staticmethod
    def _vanishes(name: str, args: tuple[Any, ...]) -> bool:
        if "scaled_dot_product" in name:
            return not args[2].any()
        if name not in _PRODUCTS:
            return False
        added = args[_PRODUCTS[name]] if _PRODUCTS[name] < len(args) else None
        factors = args[1:3] if _PRODUCTS[name] == 0 else args[:2]
        return (added is None or not added.any()) and not all(f.any() for f in factors)


def _zeros_like(out: Any) -> Any:
    if isinstance(out, Tensor):
        return torch.zeros_like(out, device="cpu")
    return type(out)([_zeros_like(x) for x in out]) if isinstance(out, (tuple, list)) else out
