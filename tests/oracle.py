"""The masked-dense oracle: what a sliced model must compute, from the dense model and the keep-set alone.

Removed channels are zeroed in every parameter; norms take their statistics over the kept channels only; attention
keeps the original head size's scale because the heads keep their size. A plan is right if the sliced model equals it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import diffprune_fast as dpf
from diffprune_fast.plan import sliced_shapes


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """float64, with random values everywhere: fresh models have zero-initialised layers that hide errors."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            fan_in = max(p[0].numel(), 1) if p.dim() > 1 else 1
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / fan_in**0.5)
            if p.dim() == 1:
                p.mul_(0.3).add_(1.0)
        for name, b in model.named_buffers():
            if b.is_floating_point() and "running" in name:
                b.copy_(torch.rand(b.shape, generator=generator, dtype=b.dtype) + 0.5)
    return model


def masked_dense(model: nn.Module, plan: dpf.Plan, keep: dict[str, np.ndarray]) -> nn.Module:
    dense = copy.deepcopy(model)
    tensors = {**dict(dense.named_parameters()), **dict(dense.named_buffers())}
    with torch.no_grad():
        for (name, dim), kept in sliced_shapes(model, plan, keep).kept.items():
            gone = np.setdiff1d(np.arange(plan.shapes[name][dim]), kept)
            tensors[name].index_fill_(dim, torch.from_numpy(gone), 1.0 if name.endswith("running_var") else 0.0)
    return dense


class _KeptStatistics(TorchFunctionMode):
    """Norms over the kept channels: those whose weight (or, without one, whose input) isn't all zero."""

    def __init__(self, norm_groups: str) -> None:
        super().__init__()
        self.norm_groups = norm_groups

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.group_norm:
            return self.group_norm(*args, **kwargs)
        if func is F.layer_norm:
            return self.layer_norm(*args, **kwargs)
        if func is F.rms_norm:
            return self.rms_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def group_norm(
        self, x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        kept = _kept(x.movedim(1, -1), weight)
        out = torch.zeros_like(x)
        w = weight[kept] if weight is not None else None
        b = bias[kept] if bias is not None else None
        if num_groups == x.shape[1]:
            out[:, kept] = F.group_norm(x[:, kept], int(kept.sum()), w, b, eps)
        elif self.norm_groups == "count":
            out[:, kept] = F.group_norm(x[:, kept], num_groups, w, b, eps)
        else:
            for rows in torch.arange(x.shape[1]).chunk(num_groups):
                rows = rows[kept[rows]]
                wr = weight[rows] if weight is not None else None
                br = bias[rows] if bias is not None else None
                out[:, rows] = F.group_norm(x[:, rows], 1, wr, br, eps)
        return out

    def layer_norm(
        self, x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        kept = _kept(x, weight)
        out = torch.zeros_like(x)
        w = weight[kept] if weight is not None else None
        b = bias[kept] if bias is not None else None
        out[..., kept] = F.layer_norm(x[..., kept], (int(kept.sum()),), w, b, eps)
        return out

    def rms_norm(self, x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        kept = _kept(x, weight)
        out = torch.zeros_like(x)
        w = weight[kept] if weight is not None else None
        out[..., kept] = F.rms_norm(x[..., kept], (int(kept.sum()),), w, eps)
        return out


def _kept(channels_last: Tensor, weight: Tensor | None) -> Tensor:
    if weight is not None:
        return weight != 0
    return (channels_last.reshape(-1, channels_last.shape[-1]) != 0).any(0)


@contextmanager
def kept_statistics(norm_groups: str) -> Iterator[None]:
    with _KeptStatistics(norm_groups):
        yield


def random_keep(plan: dpf.Plan, ratio: float, seed: int, norm_groups: str = "exact") -> dict[str, np.ndarray]:
    """A random keep-set that the plan's constraints allow."""
    scores = np.random.default_rng(seed).random(plan.n_units)
    selection = dpf.select(
        plan, scores, ratio=ratio, round_to=1, norm_groups=norm_groups, offsets="independent", ranking="local"
    )
    return selection.keep


def assert_exact(
    model: nn.Module,
    run: Callable[[nn.Module], Tensor],
    *,
    ratio: float = 0.3,
    seed: int = 0,
    norm_groups: str = "exact",
    example_inputs: Any = None,
    tolerance: float = 1e-9,
    smaller: float = 0.95,
) -> dpf.PruneResult:
    """Prune a random keep-set and compare with the masked dense model; the sliced one must really be smaller."""
    model = randomised(model, seed)
    plan = dpf.trace(model, example_inputs)
    keep = random_keep(plan, ratio, seed, norm_groups)
    dense = masked_dense(model, plan, keep)
    with torch.no_grad():
        with kept_statistics(norm_groups):
            want = run(dense)
        unpruned = run(model)
        result = dpf.prune(model, plan, keep, norm_groups=norm_groups, example_inputs=example_inputs)
        got = run(model)
    assert result.after.params <= smaller * result.before.params, str(result)
    assert sum(p.numel() for p in model.parameters()) == result.after.params
    scale = want.abs().max().item()
    assert scale > 1e-3, "the comparison would prove nothing: the output is all but zero"
    assert not torch.allclose(want, unpruned, rtol=1e-3), "the comparison would prove nothing: pruning changed nothing"
    error = (got - want).abs().max().item() / scale
    assert error <= tolerance, f"sliced and masked model differ by {error:.2e} of the output's scale"
    return result
