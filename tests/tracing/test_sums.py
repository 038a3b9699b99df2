"""Sums over channels: exact where channels that go would have added nothing (StyleGAN2's layers), frozen elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_exact
from torch import Tensor, nn

import diffprune_fast as dpf

Z = torch.randn(2, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


class Modulated(nn.Module):
    """A convolution whose weights a style scales, input by input; ``fused``: the samples are groups of one."""

    def __init__(self, inputs: int, outputs: int, fused: bool, demodulate: bool) -> None:
        super().__init__()
        self.fused, self.demodulate = fused, demodulate
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        self.style, self.bias = nn.Linear(8, inputs), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        style = self.style(z)
        if self.fused:
            scaled = self.weight[None] * style[:, None, :, None, None]
            if self.demodulate:
                scaled = scaled * (scaled.square().sum(dim=[2, 3, 4]) + 1e-8).rsqrt()[:, :, None, None, None]
            merged = x.reshape(1, -1, *x.shape[2:]), scaled.reshape(-1, *scaled.shape[2:])
            h = F.conv2d(*merged, padding=1, groups=len(x)).reshape(len(x), -1, *x.shape[2:])
        else:
            h = F.conv2d(x * style[:, :, None, None], self.weight, padding=1)
            if self.demodulate:
                energy = (self.weight.square().sum(dim=[2, 3])[None] * style.square()[:, None]).sum(dim=2)
                h = h * torch.rsqrt(energy + 1e-8)[:, :, None, None]
        return F.leaky_relu(h + self.bias[:, None, None], 0.2)


class Generator(nn.Module):
    def __init__(self, fused: bool, demodulate: bool) -> None:
        super().__init__()
        self.constant, self.map = nn.Parameter(torch.randn(1, 16, 6, 6)), nn.Linear(5, 8)
        self.first = Modulated(16, 24, fused, demodulate)
        self.second = Modulated(24, 20, fused, demodulate)
        self.out = Modulated(20, 3, fused, False)

    def forward(self, z: Tensor) -> Tensor:
        z = F.silu(self.map(z))
        h = self.constant.repeat(len(z), 1, 1, 1)
        return self.out(self.second(self.first(h, z), z), z)


@pytest.mark.parametrize("traced", [1, 2], ids=["one sample", "two samples"])
@pytest.mark.parametrize("demodulate", [True, False], ids=["demodulated", "modulated"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "apart"])
def test_modulated_convolutions_lose_inputs_and_outputs(fused: bool, demodulate: bool, traced: int) -> None:
    model = Generator(fused, demodulate)
    result = assert_exact(model, lambda m: m(Z), ratio=0.4, example_inputs=(Z[:traced],))
    assert result.after.params < 0.5 * result.before.params
    assert model.second.weight.shape[:2] == (12, 14)


class Summed(nn.Module):
    def __init__(self, score: Callable[[Summed, Tensor], Tensor]) -> None:
        super().__init__()
        self.score = score
        self.a, self.b, self.embedding = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 3, 1), nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(F.silu(h)) + self.score(self, h)


def written(m: Summed, h: Tensor) -> Tensor:
    h.view(len(h), -1, 36).add_(1)
    return h.sum(1, keepdim=True)


def read(m: Summed, h: Tensor) -> Tensor:
    """What is written into is of its own memory, h is only read."""
    doubled = h * 2
    doubled.view(len(h), -1, 36).add_(h.view(len(h), -1, 36))
    return h.sum(1, keepdim=True)


EXACT: dict[str, Callable[[Summed, Tensor], Tensor]] = {
    "plain": lambda m, h: h.sum(1, keepdim=True),
    "projection": lambda m, h: (m.embedding * h.mean((2, 3))).sum(1)[:, None, None, None],
    "of activations": lambda m, h: F.gelu(h / 2 - h.abs() ** 2).sum(1, keepdim=True),
    "gated": lambda m, h: (h * h.sigmoid()).sum(dim=(1, 2, 3), keepdim=True),
    "read by what is written elsewhere": read,
    "length": lambda m, h: h.pow(2).sum(1, keepdim=True).sqrt(),
}
FROZEN: dict[str, Callable[[Summed, Tensor], Tensor]] = {
    "of gates": lambda m, h: h.sigmoid().sum(1, keepdim=True),
    "shifted": lambda m, h: (h + 1).sum(1, keepdim=True),
    "shifted by pixels": lambda m, h: (h + h[:1, :1].detach()).sum(1, keepdim=True),
    "inverse": lambda m, h: (h / h.exp()).exp().sum(1, keepdim=True),
    "power of a number": lambda m, h: torch.pow(2.0, h).sum(1, keepdim=True),
    "power zero": lambda m, h: h.pow(0).sum(1, keepdim=True),
    "compared": lambda m, h: (h >= 0).to(h.dtype).sum(1, keepdim=True),
    "clamped": lambda m, h: h.clamp(min=0.1).sum(1, keepdim=True),
    "ones": lambda m, h: torch.ones_like(h).sum(1, keepdim=True) * 0.1,
    "written through a view": written,
    "largest": lambda m, h: h.amax(1, keepdim=True),
    "mean": lambda m, h: h.mean(1, keepdim=True),
}


@pytest.mark.parametrize("name", EXACT)
def test_sum_of_what_is_zero_where_channels_went_is_exact(name: str) -> None:
    model = Summed(EXACT[name])
    assert_exact(model, lambda m: m(X), ratio=0.4, example_inputs=(X,))
    assert model.a.out_channels == 10


@pytest.mark.parametrize("name", FROZEN)
def test_channels_that_would_add_something_to_a_sum_stay(name: str) -> None:
    plan = dpf.trace(Summed(FROZEN[name]), (X.float(),))
    assert plan.groups == ()


def test_weights_normed_by_a_width_stay_and_say_so() -> None:
    """EDM2's magnitude-preserving layers read how many inputs there are, in numbers."""

    class Preserving(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            norm = torch.linalg.vector_norm(self.weight, dim=(1, 2, 3), keepdim=True)
            share = (norm.numel() / self.weight.numel()) ** 0.5
            weight = self.weight / torch.add(1e-4, norm, alpha=share)
            return F.conv2d(x, weight * self.weight[0].numel() ** -0.5, padding=1)

    model = nn.Sequential(Preserving(3, 16), nn.SiLU(), Preserving(16, 16), nn.SiLU(), Preserving(16, 3))
    plan = dpf.trace(model, (X.float(),))
    assert plan.groups == ()
    assert "reduces over channels in 2 (linalg_vector_norm)" in plan.frozen.values()
