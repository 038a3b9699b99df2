"""The masked-dense oracle for any architecture: also with norms spelled out, casts to float32, uneven keep-sets.

The sliced model runs under :func:`mean_sizes`, then the masked one under :func:`spelled_statistics` with what that
found, beside :func:`oracle.kept_statistics`; both under :class:`Float64Throughout`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from models import Case
from oracle import kept_statistics, masked_dense, random_keep
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import diffprune_fast as dpf

EXACT = 1e-9  # of the output's scale, in float64; what rounding leaves is 1e-16 to 1e-13


class Float64Throughout(TorchFunctionMode):
    """Casts to float32 are to float64, so that classes which compute norms in float32 compare to 1e-9 too."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            if func is Tensor.float:
                return args[0].double()
            if func is Tensor.to and torch.float32 in (*args[1:], *kwargs.values()):
                args = tuple([torch.float64 if a is torch.float32 else a for a in args])
                kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
            if func is Tensor.type and torch.float32 in args[1:]:
                return args[0].double()
        return func(*args, **kwargs)


def _mean_size(func: Callable[..., Any], args: Any, kwargs: Any) -> int | None:
    """How many entries a mean is over; None for another operation."""
    if func not in (Tensor.mean, torch.mean):
        return None
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    dims = [dim] if isinstance(dim, int) else list(dim or range(args[0].dim()))
    return math.prod(args[0].shape[d] for d in dims)


class _MeanSizes(TorchFunctionMode):
    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        size = _mean_size(func, args, kwargs or {})
        if size is not None:
            self.sizes.append(size)
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
        size = _mean_size(func, args, kwargs)
        if size is not None:
            return func(*args, **kwargs) * (size / next(self.sizes))
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
    """Yields a list that gets the size of every mean, in the order of the calls."""
    sizes: list[int] = []
    with _MeanSizes(sizes):
        yield sizes


@contextmanager
def spelled_statistics(sizes: list[int]) -> Iterator[None]:
    with _SpelledStatistics(sizes):
        yield


def uneven_keep(plan: dpf.Plan, ratio: float, seed: int) -> dict[str, np.ndarray]:
    """A random keep-set in which groups keep different shares, so that sizes which only happen to agree don't."""
    generator = np.random.default_rng(seed)
    scores = generator.random(plan.n_units)
    ratios = {g.name: float(generator.uniform(0.3, 1.7) * ratio) for g in plan.groups}
    selection = dpf.select(
        plan,
        scores,
        ratio=ratio,
        ratios=ratios,
        round_to=1,
        norm_groups="count",
        offsets="independent",
        ranking="local",
    )
    return selection.keep


def compare(case: Case, model: nn.Module, plan: dpf.Plan, ratio: float, seed: int, run: str) -> tuple[float, float]:
    """Prune a random keep-set of the traced model, which stays as it is: the error of the sliced copy against the
    masked dense model, and the share of parameters left."""
    norm_groups = "exact" if run == "exact" else "count"
    uneven = run in ("uneven", "heads")
    keep = uneven_keep(plan, ratio, seed) if uneven else random_keep(plan, ratio, seed, norm_groups)
    dense = masked_dense(model, plan, keep)
    with torch.no_grad(), Float64Throughout():
        unpruned = case.run(model)
    result = dpf.prune(model, plan, keep, norm_groups=norm_groups, example_inputs=case.example_inputs, inplace=False)
    with torch.no_grad(), Float64Throughout():
        with mean_sizes() as sizes:
            got = case.run(result.model)
        with kept_statistics(norm_groups), spelled_statistics(sizes):
            want = case.run(dense)
    scale = want.abs().max().item()
    if not scale > 1e-3:
        raise AssertionError("the output is all but zero: the comparison would prove nothing")
    if torch.allclose(want, unpruned, rtol=1e-3, atol=1e-3 * scale):
        raise AssertionError("pruning all but changes nothing: the comparison would prove nothing")
    return (got - want).abs().max().item() / scale, result.after.params / result.before.params
