"""Forwards that send tokens to experts, write at ids, or read what is in their inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_exact
from torch import Tensor, nn

import diffprune_fast as dpf
from diffprune_fast.tracing import TraceError


def _tokens() -> Tensor:
    return torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Experts(nn.Module):
    """Two of four experts for every token; ``write``: how their outputs come together."""

    def __init__(self, write: str) -> None:
        super().__init__()
        self.write = write
        self.inside, self.outside = nn.Linear(8, 24), nn.Linear(24, 8)
        self.gate = nn.Linear(24, 4)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(24, 16), nn.SiLU(), nn.Linear(16, 24)) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.inside(x).reshape(-1, self.gate.in_features)
        weights, chosen = torch.topk(self.gate(h).softmax(-1), 2)
        out = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            token, rank = torch.where(chosen == i)
            part = expert(h[token]) * weights[token, rank, None]
            if self.write == "index_add_":
                out.index_add_(0, token, part)
            elif self.write == "scatter_add_":
                out.scatter_add_(0, token[:, None].repeat(1, h.shape[-1]), part)
            else:
                out[token] = out[token] + part
        return self.outside(out).view(x.shape[0], x.shape[1], -1)


@pytest.mark.parametrize("write", ["index_add_", "scatter_add_", "index_put_"])
def test_experts_lose_channels_inside_and_outside(write: str) -> None:
    result = assert_exact(Experts(write), lambda m: m(_tokens()), example_inputs=(_tokens(),), smaller=0.8)
    assert {"inside.weight", "experts.3.0.weight", "experts.0.2.weight"} <= {
        m.parameter for g in result.plan.groups for m in g.members
    }


def test_scatter_by_the_channel_freezes_the_channels() -> None:
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            ids = torch.arange(8).flip(0).expand(2, 6, 8)
            return self.b(h.scatter_add(1, ids % 6, h))

    plan = dpf.trace(Shuffled(), (torch.zeros(2, 6, 8),))
    assert "a.weight:0" in plan.frozen


class Branching(nn.Module):
    """A branch on the values of an input, as HunyuanVideo 1.5's on its image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        doubled = image * 2
        if torch.all(doubled == 0):
            return self.c(F.silu(self.a(x)))
        return self.c(F.silu(self.a(x) + self.b(image)))


@pytest.mark.parametrize("given", [0.0, 1.0])
def test_branch_on_an_input_is_the_one_that_its_values_take(given: float) -> None:
    image = torch.full((2, 6, 8), given, dtype=torch.float64)
    model = Branching()
    result = assert_exact(model, lambda m: m(_tokens(), image), example_inputs=(_tokens(), image))
    assert ("b.weight" in {m.parameter for g in result.plan.groups for m in g.members}) is bool(given)


def test_branch_on_an_input_without_values_is_refused() -> None:
    with pytest.raises(TraceError, match="reads values"):
        dpf.trace(Branching(), (torch.zeros(2, 6, 8), torch.zeros(2, 6, 8, device="meta")))


def test_branch_on_something_written_since_is_refused() -> None:
    class Written(Branching):
        def forward(self, x: Tensor, image: Tensor) -> Tensor:
            whole = image * 2
            first = whole[:, 0]
            whole.add_(1)
            return self.c(self.a(x)) if (first == 0).all() else self.c(self.b(x))

    with pytest.raises(TraceError, match="reads values"):
        dpf.trace(Written(), (torch.zeros(2, 6, 8), torch.zeros(2, 6, 8)))


def test_entries_repeated_by_their_own_counts_keep_their_channels() -> None:
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).repeat_interleave(torch.tensor([1, 2, 1, 3, 1, 1]), dim=1))

    assert_exact(Repeated(), lambda m: m(_tokens()), example_inputs=(_tokens(),))
