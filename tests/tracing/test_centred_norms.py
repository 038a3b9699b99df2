"""LayerNorms that a forward spells out over channels: over those that stay where that is all they are, else frozen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracle import masked_dense, random_keep, randomised
from torch import Tensor, nn

import diffprune_fast as dpf

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
Norm = Callable[[Tensor, Tensor], Tensor]


class Spelled(nn.Module):
    """a -> norm -> gain, shift -> b, with a second branch beside the first."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.norm = norm
        self.a, self.other, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 16, 1), nn.Conv2d(16, 3, 1)
        self.gain, self.shift = nn.Parameter(torch.ones(16)), nn.Parameter(torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.a(x), self.other(x))
        return self.b(F.silu(self.gain[:, None, None] * h + self.shift[:, None, None]))


def mean(x: Tensor) -> Tensor:
    return x.mean(1, keepdim=True)


def convnext(x: Tensor, y: Tensor) -> Tensor:
    u = x.mean(1, keepdim=True)
    s = (x - u).pow(2).mean(1, keepdim=True)
    return (x - u) / torch.sqrt(s + 1e-6)


def by_var_mean(x: Tensor, y: Tensor) -> Tensor:
    var, m = torch.var_mean(x, dim=1, unbiased=False, keepdim=True)
    return (x - m) * torch.rsqrt(var + 1e-6)


def once(x: Tensor, y: Tensor) -> Tensor:
    c = x.double() - x.double().mean(dim=1, keepdim=True)
    return (c * c.square().mean(dim=1, keepdim=True).clamp(min=1e-6).rsqrt()).to(x.dtype) + y


NORMS: dict[str, Norm] = {
    "ConvNeXt's": convnext,
    "centred once, in another dtype": once,
    "by its variance": lambda x, y: (x - mean(x)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt(),
    "by variance and mean at once": by_var_mean,
    "by its standard deviation, eps outside": lambda x, y: (x - mean(x)) / (x.std(1, keepdim=True) + 1e-5) + y,
    "by mean absolute deviation": lambda x, y: (x - mean(x)) / mean((x - mean(x)).abs()),
    "by its length": lambda x, y: 4 * F.normalize(x - mean(x), dim=1),
    "over channels and pixels": lambda x, y: (
        (x - x.mean((1, 2, 3), keepdim=True)) / (x.var((1, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
    ),
}
OTHERS: dict[str, Norm] = {
    "centred only": lambda x, y: x - mean(x),
    "less half its mean": lambda x, y: (x - 0.5 * mean(x)) / (mean((x - 0.5 * mean(x)).pow(2)) + 1e-6).sqrt(),
    "less its mean twice": lambda x, y: (
        torch.sub(x, mean(x), alpha=2) / torch.sub(x, mean(x), alpha=2).pow(2).mean(1, keepdim=True).sqrt()
    ),
    "less the mean of absolutes": lambda x, y: (x - mean(x.abs())) / (mean((x - mean(x.abs())).pow(2)) + 1e-6).sqrt(),
    "less another mean": lambda x, y: (x - mean(y)) / (mean((x - mean(y)).pow(2)) + 1e-6).sqrt(),
    "by the root mean square": lambda x, y: (x - mean(x)) * torch.rsqrt(mean(x.pow(2)) + 1e-6),
    "by the variance": lambda x, y: (x - mean(x)) / (x.var(1, keepdim=True) + 1e-6),
    "by another's deviation": lambda x, y: (x - mean(x)) / (y.std(1, keepdim=True) + 1e-6),
    "another by its deviation": lambda x, y: (y - mean(y)) / (x.std(1, keepdim=True) + 1e-6),
    "not centred": lambda x, y: x / (x.std(1, keepdim=True) + 1e-6),
    "the mean added again": lambda x, y: convnext(x, y) + mean(x),
    "the deviation added again": lambda x, y: convnext(x, y) + x.std(1, keepdim=True),
    "the centred added again": lambda x, y: convnext(x, y) + (x - mean(x)),
    "of an activation": lambda x, y: (x - mean(x)) / (mean(F.silu(x - mean(x)).pow(2)) + 1e-6).sqrt(),
    "without its dim": lambda x, y: (x - x.mean(1)[:, None]) / (x.std(1)[:, None] + 1e-6),
    "by pixels": lambda x, y: (x - mean(x)) / ((x - mean(x)).pow(2).mean((2, 3), keepdim=True) + 1e-6).sqrt(),
    "in place": lambda x, y: x.sub_(mean(x)) / (mean(x.pow(2)) + 1e-6).sqrt(),
}


@pytest.mark.parametrize("name", NORMS)
def test_spelled_layer_norm_is_over_the_kept_channels(name: str) -> None:
    norm = NORMS[name]
    model = randomised(Spelled(norm))
    plan = dpf.trace(model, (X,))
    keep = random_keep(plan, 0.4, 0)
    dense = masked_dense(model, plan, keep)
    kept = (dense.gain != 0).nonzero().flatten()
    dense.norm = lambda x, y: torch.zeros_like(x).index_copy(1, kept, norm(x[:, kept], y[:, kept]))
    result = dpf.prune(model, plan, keep, example_inputs=(X,))
    with torch.no_grad():
        want, got = dense(X), model(X)
    assert model.a.out_channels == len(kept) < 16
    assert (got - want).abs().max() <= 1e-9 * want.abs().max()
    assert result.proof is not None
    assert result.proof.error is not None
    assert result.proof.error < 1e-9


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_less_its_mean_and_no_norm_freezes(name: str) -> None:
    plan = dpf.trace(Spelled(OTHERS[name]), (X.float(),))
    assert "reduces over channels in model" in plan.frozen["a.weight:0"]
    assert "a" not in plan.position


def test_centred_channels_as_an_output_freeze() -> None:
    class Output(Spelled):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            h = self.a(x)
            return self.b(convnext(h, h)), h - mean(h)

    assert "reduces over channels in model" in dpf.trace(Output(convnext), (X.float(),)).frozen["a.weight:0"]
