"""What the masked-dense oracle needs for norms that a model spells out, and for models that cast to float32.

The sliced model runs under :func:`mean_sizes`, then the masked one under :func:`spelled_statistics` with what that
found, beside :func:`oracle.kept_statistics`; both under :class:`Float64Throughout`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Float64Throughout(TorchFunctionMode):
    """A cast of float64 to float32 does nothing, so that classes which compute norms in float32 compare to 1e-9 too."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if func is Tensor.to and torch.float32 in (*args[1:], *kwargs.values()):
                args = tuple([torch.float64 if a is torch.float32 else a for a in args])
                kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
            if func is Tensor.type and torch.float32 in args[1:]:
                return args[0]
        return func(*args, **kwargs)


def _last_dim_mean(func: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    if func not in (Tensor.mean, torch.mean) or args[0].dim() < 2:
        return False
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    dims = [dim] if isinstance(dim, int) else list(dim or [])
    return [d % args[0].dim() for d in dims] == [args[0].dim() - 1]


class _MeanSizes(TorchFunctionMode):
    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _last_dim_mean(func, args, kwargs or {}):
            self.sizes.append(args[0].shape[-1])
        return func(*args, **(kwargs or {}))


class _SpelledStatistics(TorchFunctionMode):
    """Means over kept channels only, and norms without weights head by head.

    How many channels a mean is over can't be seen from zeros (activations may underflow to zero): the sliced model's
    run tells. A head's norm sees them, for projections don't underflow.
    """

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = iter(sizes)

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _last_dim_mean(func, args, kwargs):
            return func(*args, **kwargs) * (args[0].shape[-1] / next(self.sizes))
        weight = args[2] if len(args) > 2 else kwargs.get("weight")
        if func is F.layer_norm and weight is None and args[0].dim() > 3:
            return self.layer_norm(*args, **kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def layer_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
        """(batch, ..., heads, dim) or (batch, heads, ..., dim): every head has its own kept channels."""
        kept = (x != 0).any(0, keepdim=True)
        n = kept.sum(-1, keepdim=True).clamp(min=1)
        mean = x.sum(-1, keepdim=True) / n
        centred = (x - mean) * kept
        return centred * torch.rsqrt(centred.square().sum(-1, keepdim=True) / n + eps)


@contextmanager
def mean_sizes() -> Iterator[list[int]]:
    """Yields a list that gets the size of every mean over a last dim, in the order of the calls."""
    sizes: list[int] = []
    with _MeanSizes(sizes):
        yield sizes


@contextmanager
def spelled_statistics(sizes: list[int]) -> Iterator[None]:
    with _SpelledStatistics(sizes):
        yield
