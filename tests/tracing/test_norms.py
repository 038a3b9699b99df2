"""Norms that a forward spells out, and what takes the softmax scale: exact where they are known, frozen where not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import Case
from oracle import randomised
from oracle_zoo import EXACT, compare
from torch import Tensor, nn

import diffprune_fast as dpf

X = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
SHAPE = (torch.empty(1, 6, 5),)


def assert_exact(make: Callable[[], nn.Module]) -> dpf.Plan:
    case = Case("", make, lambda m: m(X), SHAPE)
    torch.manual_seed(0)
    model = randomised(make())
    plan = dpf.trace(model, SHAPE, units="dims")
    for run in ("exact", "uneven"):
        error, left = compare(case, model, plan, 0.4, 0, run)
        assert error <= EXACT
        assert left < 0.95
    return plan


class Spelled(nn.Module):
    """a -> norm -> b, with a second branch beside the first."""

    def __init__(self, norm: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = norm
        self.a, self.other, self.b = nn.Linear(5, 16), nn.Linear(5, 16), nn.Linear(16, 3)
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.weight * self.norm(self.a(x), self.other(x)))


def mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def responses(x: Tensor) -> Tensor:
    n = x.norm(dim=1, keepdim=True)
    return n / (mean(n) + 1e-6)


NORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "root mean square": lambda x, y: x * torch.rsqrt(mean(x.pow(2)) + 1e-6) + y,
    "in place": lambda x, y: x * mean(x.square()).add_(1e-6).sqrt_().reciprocal_() + y,
    "in another dtype": lambda x, y: (
        (x.double() / mean(x.double() * x.double()).clamp(min=1e-6).sqrt()).to(x.dtype) + y
    ),
    "mean of absolutes": lambda x, y: x / mean(x.abs()) + y,
    "global response": lambda x, y: x * responses(x) + y,
}
OTHER_MEANS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "subtracted": lambda x, y: x - mean(x) + y,
    "added elsewhere": lambda x, y: x * torch.rsqrt(mean(x.pow(2))) + y + mean(x),
    "a gate": lambda x, y: x * mean(x).sigmoid() + y,
    "of another power": lambda x, y: x * torch.rsqrt(mean(x.pow(4))) + y,
    "multiplied": lambda x, y: x * mean(x.pow(2)).sqrt() + y,
    "of another tensor": lambda x, y: y * torch.rsqrt(mean(x.pow(2))) + x,
    "of an activation": lambda x, y: x * torch.rsqrt(mean(F.silu(x).pow(2))) + y,
    "shifted by another": lambda x, y: x * torch.rsqrt(mean(x.pow(2)) + mean(y.pow(2))) + y,
    "without its dim": lambda x, y: x * torch.rsqrt(x.pow(2).mean(-1))[..., None] + y,
}


@pytest.mark.parametrize("name", NORMS)
def test_spelled_norm_is_over_the_kept_channels(name: str) -> None:
    plan = assert_exact(lambda: Spelled(NORMS[name]))
    assert {m.place for m in plan["a"].members} >= {"a.weight:0", "weight:0", "b.weight:1"}


@pytest.mark.parametrize("name", OTHER_MEANS)
def test_mean_that_is_no_norms_statistic_freezes(name: str) -> None:
    plan = dpf.trace(Spelled(OTHER_MEANS[name]), SHAPE)
    assert plan.groups == ()
    assert "reduces over channels in model (mean)" in plan.frozen.values()


def test_mean_over_channels_as_an_output_freezes() -> None:
    class Output(Spelled):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            h = self.a(x)
            variance = mean(h.pow(2))
            return self.b(h * torch.rsqrt(variance)), variance

    assert "reduces over channels" in dpf.trace(Output(F.silu), SHAPE).frozen["a.weight:0"]


class RMS(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(mean(x.float().pow(2)) + 1e-6) * self.weight + self.bias


class Attention(nn.Module):
    """Two streams of tokens; ``queries`` makes one tensor of their heads. All head sizes are read from the widths."""

    def __init__(self, queries: Callable[[Attention, Tensor, Tensor], Tensor], twice: bool = False) -> None:
        super().__init__()
        self.queries, self.twice = queries, twice
        self.text = nn.Linear(5, 12)
        self.q, self.q_text, self.k, self.v = (nn.Linear(12, 32) for _ in range(4))
        self.norm, self.norm_text = RMS(8), RMS(8)
        self.embed, self.out = nn.Linear(5, 12), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, text = self.embed(x), self.text(x)
        q, q_text, k, v = (
            p(t).unflatten(-1, (4, -1)).transpose(1, 2)
            for p, t in ((self.q, h), (self.q_text, text), (self.k, h), (self.v, h))
        )
        mixed = F.scaled_dot_product_attention(self.queries(self, q, q_text), k, v)
        if self.twice:
            mixed = mixed[..., : q.shape[2], :] + F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


SCALED: dict[str, tuple[Callable[[Attention, Tensor, Tensor], Tensor], list[str]]] = {
    "side by side": (
        lambda m, q, text: torch.cat([q, text], dim=2),
        ["q.bias", "q.weight", "q_text.bias", "q_text.weight"],
    ),
    "of which only the type is read": (
        lambda m, q, text: q.type_as(torch.zeros_like(text)).type_as(q.new_zeros(3)).type_as(q),
        ["q.bias", "q.weight"],
    ),
    "a sum": (lambda m, q, text: q - text, ["q.bias", "q.weight", "q_text.bias", "q_text.weight"]),
    "normed": (lambda m, q, text: m.norm(q), ["norm.bias", "norm.weight"]),
    "normed side by side": (
        lambda m, q, text: torch.cat([m.norm(q), m.norm_text(text)], dim=2),
        ["norm.bias", "norm.weight", "norm_text.bias", "norm_text.weight"],
    ),
    "turned": (
        lambda m, q, text: q * 0.5 + torch.cat([-q[:, :, 3:], q[:, :, :3]], dim=2) * 0.25,
        ["q.bias", "q.weight"],
    ),
}
UNSCALED: dict[str, Callable[[Attention, Tensor, Tensor], Tensor]] = {
    "shifted": lambda m, q, text: q + 1.0,
    "half of it unknown": lambda m, q, text: torch.cat([q, F.silu(text)], dim=2),
    "normed without a weight": lambda m, q, text: q * torch.rsqrt(mean(q.pow(2))),
}


@pytest.mark.parametrize("name", SCALED)
def test_everything_that_feeds_the_queries_takes_the_softmax_scale(name: str) -> None:
    queries, targets = SCALED[name]
    plan = assert_exact(lambda: Attention(queries))
    assert sorted(n for fix in plan.scale_fixes for n, _ in fix.targets) == targets


@pytest.mark.parametrize("name", UNSCALED)
def test_head_dims_stay_where_nothing_takes_the_softmax_scale(name: str) -> None:
    plan = assert_exact(lambda: Attention(UNSCALED[name]))
    assert plan.scale_fixes == ()
    assert "softmax scale" in plan.frozen["q.weight:0"]


def test_projection_of_two_attentions_takes_the_softmax_scale_once() -> None:
    plan = assert_exact(lambda: Attention(lambda m, q, text: torch.cat([q, text], dim=2), twice=True))
    assert sorted(n for fix in plan.scale_fixes for n, _ in fix.targets) == SCALED["side by side"][1]


def test_head_dims_stay_where_the_queries_are_used_elsewhere() -> None:
    """A factor in the query's weights would change the sum."""

    class Residual(Attention):
        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            q, k, v = (p(h).unflatten(-1, (4, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
            return self.out((F.scaled_dot_product_attention(q, k, v) + q).transpose(1, 2).flatten(2))

    plan = assert_exact(lambda: Residual(F.silu))
    assert "softmax scale" in plan.frozen["q.weight:0"]


def test_head_dims_stay_where_the_query_norms_weight_is_used_elsewhere() -> None:
    class Shared(Attention):
        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            q, k, v = (p(h).unflatten(-1, (4, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
            v = v * F.silu(self.norm.weight)
            return self.out(F.scaled_dot_product_attention(self.norm(q), k, v).transpose(1, 2).flatten(2))

    plan = assert_exact(lambda: Shared(F.silu))
    assert "softmax scale" in plan.frozen["q.weight:0"]


def test_keys_of_grouped_queries_go_with_all_their_heads() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Linear(5, 12), nn.Linear(32, 3)
            self.q, self.k, self.v = nn.Linear(12, 32), nn.Linear(12, 16), nn.Linear(12, 16)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            q, k, v = (p(h).unflatten(-1, (n, -1)).transpose(1, 2) for p, n in ((self.q, 4), (self.k, 2), (self.v, 2)))
            return self.out(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))

    plan = assert_exact(Grouped)
    queries = next(m for m in plan["q"].members if m.place == "q.weight:0")
    assert queries.index[0].tolist() == [0, 8], "two heads of queries for one of keys"
