"""Blocks of language models: grouped-query attention, rotary embeddings, tied embeddings, fused projections."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from models import Case
from torch import Tensor, nn


def rotary_tables(length: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    frequencies = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    both = torch.cat([angles, angles], dim=-1)
    return both.cos().to(dtype), both.sin().to(dtype)


def rotated(x: Tensor) -> Tensor:
    """x: (batch, heads, length, dim); the halves of a head are the pairs' first and second entries."""
    cos, sin = rotary_tables(x.shape[-2], x.shape[-1], x.dtype)
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


class GroupedQueryAttention(nn.Module):
    """``repeat``: how k and v reach the queries' heads: by "sdpa", "interleave" or "expand"."""

    def __init__(self, dim: int, heads: int, kv_heads: int, rotary: bool, repeat: str) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.rotary, self.repeat = rotary, repeat
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.o = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, -1).transpose(1, 2)
        k = self.k(x).view(b, n, self.kv_heads, -1).transpose(1, 2)
        v = self.v(x).view(b, n, self.kv_heads, -1).transpose(1, 2)
        if self.rotary:
            q, k = rotated(q), rotated(k)
        times = self.heads // self.kv_heads
        if self.repeat == "interleave":
            k, v = k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)
        elif self.repeat == "expand":
            k, v = (
                t[:, :, None].expand(b, self.kv_heads, times, n, t.shape[-1]).reshape(b, self.heads, n, -1)
                for t in (k, v)
            )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.repeat == "sdpa")
        return self.o(out.transpose(1, 2).reshape(b, n, -1))


class FusedAttention(nn.Module):
    """One projection for q, k and v. ``layout``: "chunk" (q, k, v one after the other), "heads" (per head)."""

    def __init__(self, dim: int, heads: int, layout: str) -> None:
        super().__init__()
        self.heads, self.layout = heads, layout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.o = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        if self.layout == "chunk":
            q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        else:
            q, k, v = self.qkv(x).view(b, n, self.heads, 3, -1).permute(3, 0, 2, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(out.transpose(1, 2).reshape(b, n, -1))


class SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class LanguageModel(nn.Module):
    """Pre-norm blocks between an embedding and the same embedding as the output projection."""

    def __init__(self, attention: list[nn.Module], dim: int = 64, vocabulary: int = 50, tied: bool = True) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, dim)
        self.attention = nn.ModuleList(attention)
        self.mlp = nn.ModuleList(SwiGLU(dim, 96) for _ in attention)
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(2 * len(attention) + 1))
        self.out = nn.Linear(dim, vocabulary, bias=False)
        if tied:
            self.out.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.tokens(ids)
        for i, (attention, mlp) in enumerate(zip(self.attention, self.mlp)):
            h = h + attention(self.norms[2 * i](h))
            h = h + mlp(self.norms[2 * i + 1](h))
        return self.out(self.norms[-1](h))


_ids = torch.arange(24).reshape(2, 12) * 7 % 50


def _case(name: str, *attention: tuple[type[nn.Module], tuple[object, ...]], tied: bool = True) -> Case:
    return Case(
        f"LanguageModel-{name}",
        lambda: LanguageModel([kind(64, 4, *args) for kind, args in attention], tied=tied),  # type: ignore[arg-type]
        lambda m: m(_ids),
        {"ids": _ids[:1]},  # type: ignore[arg-type]
    )


LANGUAGE_CASES = [
    _case("gqa-sdpa", (GroupedQueryAttention, (2, False, "sdpa")), (GroupedQueryAttention, (1, False, "sdpa"))),
    _case("gqa-interleave", (GroupedQueryAttention, (2, False, "interleave"))),
    _case("gqa-expand", (GroupedQueryAttention, (2, False, "expand"))),
    _case("rotary", (GroupedQueryAttention, (4, True, "none"))),
    _case("rotary-gqa", (GroupedQueryAttention, (2, True, "interleave")), (GroupedQueryAttention, (2, True, "expand"))),
    _case("fused-chunk", (FusedAttention, ("chunk",)), (FusedAttention, ("chunk",)), tied=False),
    _case("fused-heads", (FusedAttention, ("heads",))),
]
