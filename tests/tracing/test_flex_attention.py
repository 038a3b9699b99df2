"""FlexAttention: followed as any attention; heads that its functions tell apart stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_exact
from torch import Tensor, nn

import diffprune_fast as dpf

flex = pytest.importorskip("torch.nn.attention.flex_attention")
if not hasattr(torch.utils._python_dispatch.TorchDispatchMode, "supports_higher_order_operators"):
    pytest.skip("this PyTorch shows no mode what is in FlexAttention", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile:UserWarning")

X = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


class Attention(nn.Module):
    def __init__(
        self, options: Callable[[Attention, Tensor], dict[str, Any]], kv_heads: int = 4, whole: bool = False
    ) -> None:
        super().__init__()
        self.options, self.kv_heads, self.whole = options, kv_heads, whole
        self.embed, self.out = nn.Linear(5, 32), nn.Linear(64, 3)
        self.q, self.k, self.v = nn.Linear(32, 64), nn.Linear(32, 16 * kv_heads), nn.Linear(32, 16 * kv_heads)
        self.slopes, self.position = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        q, k, v = (
            p(h).unflatten(-1, (-1, 16) if self.whole else (n, -1)).transpose(1, 2)
            for p, n in ((self.q, 4), (self.k, self.kv_heads), (self.v, self.kv_heads))
        )
        out = flex.flex_attention(q, k, v, **self.options(self, q))
        return self.out((out[0] if isinstance(out, tuple) else out).transpose(1, 2).flatten(2))


def causal(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return torch.where(i >= j, score, -float("inf"))


def by_position(m: Attention, q: Tensor) -> dict[str, Any]:
    return {"score_mod": lambda score, b, h, i, j: score + m.position[i, j]}


def by_head(m: Attention, q: Tensor) -> dict[str, Any]:
    return {"score_mod": lambda score, b, h, i, j: score + m.slopes[h] * (i - j)}


def blocks(m: Attention, q: Tensor) -> dict[str, Any]:
    return {"block_mask": flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, 6, 6, device=q.device)}


def blocks_by_head(m: Attention, q: Tensor) -> dict[str, Any]:
    return {"block_mask": flex.create_block_mask(lambda b, h, i, j: i >= j + h, None, 4, 6, 6, device=q.device)}


def eager(model: nn.Module) -> Tensor:
    """As it is written: the oracle's modes can't be compiled."""
    with torch.compiler.set_stance("force_eager"):
        return model(X)


PLAIN: dict[str, Callable[[Attention, Tensor], dict[str, Any]]] = {
    "nothing": lambda m, q: {},
    "a scale that follows": lambda m, q: {"scale": q.shape[-1] ** -0.5},
    "a constant scale": lambda m, q: {"scale": 0.3},
    "causal": lambda m, q: {"score_mod": causal},
    "by position": by_position,
    "a block mask": blocks,
}


@pytest.mark.parametrize("name", PLAIN)
def test_flex_attention_loses_dims(name: str) -> None:
    model = Attention(PLAIN[name])
    assert_exact(model, eager, ratio=0.4, example_inputs=(X,))
    assert model.q.out_features == model.v.out_features < 64


@pytest.mark.parametrize("name", PLAIN)
def test_flex_attention_loses_heads(name: str) -> None:
    model = Attention(PLAIN[name], whole=True)
    assert_exact(model, eager, ratio=0.5, example_inputs=(X,))
    assert model.q.out_features == model.v.out_features == 32


@pytest.mark.parametrize("options", [by_head, blocks_by_head])
def test_heads_that_are_told_apart_stay(options: Callable[[Attention, Tensor], dict[str, Any]]) -> None:
    plan = dpf.trace(Attention(options, whole=True).eval(), (X.float(),))
    assert "is of a head that has" in plan.frozen["q.weight:0"]
    assert "q" not in plan.position


def test_scale_that_only_looks_like_the_head_size_keeps_the_dims() -> None:
    plan = dpf.trace(Attention(lambda m, q: {"scale": 0.25}), (X.float(),), units="dims")
    assert "q" not in plan.position


def test_grouped_queries_of_flex_attention_are_exact() -> None:
    model = Attention(lambda m, q: {"enable_gqa": True}, kv_heads=2)
    assert_exact(model, eager, ratio=0.4, example_inputs=(X,))
    assert model.k.out_features < 32
