"""Random networks: whatever the tracer makes of one, the sliced network is exact or it is refused untouched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import kept_statistics, masked_dense, random_keep, randomised
from torch import Tensor, nn

import diffprune_fast as dpf

SIZE = 4
X = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class RandomNet(nn.Module):
    """A random graph of layers over feature maps of one size; ``steps`` says what forward does."""

    def __init__(self, seed: int, n_steps: int = 9) -> None:
        super().__init__()
        random = np.random.default_rng(seed)
        self.layers = nn.ModuleDict()
        self.steps: list[tuple[str, tuple[int, ...]]] = []
        self.shuffles: dict[int, int] = {}
        widths = [3]
        for i in range(n_steps):
            source = len(widths) - 1 if random.random() < 0.7 else int(random.integers(len(widths)))
            width = widths[source]
            kinds = ["conv", "conv"] if i < 2 else ["conv", "norm", "act", "add", "cat", "split", "shuffle", "scale"]
            kinds += (
                ["grouped", "depthwise", "attention", "layer_norm", "transposed"] if i >= 2 and width % 8 == 0 else []
            )
            kind = str(random.choice(kinds))
            other = -1
            if kind == "add":
                same = [j for j, w in enumerate(widths) if w == width and j != source and j > 0]
                kind, other = ("add", int(random.choice(same))) if same else ("act", -1)
            elif kind == "cat":
                other = int(random.integers(1, len(widths)))
            if kind == "split" and width % 2:
                kind = "act"  # decided here and not in the forward: a branch on a width may turn when it is sliced
            self.shuffles[i] = 2 if width % 2 == 0 else 1
            widths.append(self._add(kind, i, width, widths[other], random))
            self.steps.append((kind, (source, other)))
        self.out = nn.Conv2d(widths[-1], 2, 1)

    def _add(self, kind: str, i: int, width: int, other: int, random: np.random.Generator) -> int:
        new = int(random.choice([8, 16, 24]))
        kernel, bias = int(random.choice([1, 3])), bool(random.random() < 0.7)
        made: dict[str, tuple[nn.Module | None, int]] = {
            "conv": (nn.Conv2d(width, new, kernel, padding="same", bias=bias), new),
            "cat": (None, width + other),
            "split": (None, width // 2),
        }
        if kind == "norm":
            groups = [g for g in (1, 2, 4, 8) if width % g == 0]
            made["norm"] = nn.GroupNorm(int(random.choice(groups)), width), width
        if kind == "layer_norm":
            made["layer_norm"] = nn.LayerNorm(width, elementwise_affine=bool(random.random() < 0.5)), width
        if width % 8 == 0:
            made["grouped"] = nn.Conv2d(width, 16, 1, groups=int(random.choice([2, 4]))), 16
            made["depthwise"] = nn.Conv2d(width, width, 3, padding=1, groups=width), width
            made["transposed"] = nn.ConvTranspose2d(width, 8, 1, groups=int(random.choice([1, 2]))), 8
            made["attention"] = nn.ModuleList([nn.Linear(width, width) for _ in range(4)]), width
        if kind == "scale":
            self.register_parameter(f"scale{i}", nn.Parameter(torch.randn(1, width, 1, 1)))
        layer, out = made.get(kind, (None, width))
        if layer is not None:
            self.layers[str(i)] = layer
        return out

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for i, (kind, (source, other)) in enumerate(self.steps):
            h = maps[source]
            maps.append(self._apply_step(kind, i, h, maps[other]))
        return self.out(maps[-1])

    def _apply_step(self, kind: str, i: int, h: Tensor, other: Tensor) -> Tensor:
        if kind == "act":
            return F.silu(h)
        if kind == "add":
            return h + other
        if kind == "cat":
            return torch.cat([h, other], dim=1)
        if kind == "split":
            a, b = h.chunk(2, dim=1)
            return a * torch.sigmoid(b)
        if kind == "shuffle":
            b, c, height, width = h.shape
            groups = self.shuffles[i]
            return h.view(b, groups, c // groups, height, width).transpose(1, 2).reshape(h.shape)
        if kind == "scale":
            return h * getattr(self, f"scale{i}")
        layer = self.layers[str(i)]
        if kind == "layer_norm":
            return layer(h.movedim(1, -1)).movedim(-1, 1)
        if kind == "attention":
            tokens = h.flatten(2).transpose(1, 2)
            q, k, v = (p(tokens).unflatten(-1, (4, -1)).transpose(1, 2) for p in list(layer)[:3])
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return h + layer[3](mixed).transpose(1, 2).reshape(h.shape)
        return layer(h)


@pytest.mark.parametrize("norm_groups", ["exact", "count"])
@pytest.mark.parametrize("seed", range(60))
def test_random_network_is_sliced_exactly_or_refused(seed: int, norm_groups: str) -> None:
    torch.manual_seed(seed)
    model = randomised(RandomNet(seed), seed)
    plan = dpf.trace(model, (X[:1],))
    try:
        keep = random_keep(plan, 0.4, seed, norm_groups)
    except dpf.selection.BudgetError:
        pytest.skip("nothing in this network may be removed")
    dense = masked_dense(model, plan, keep)
    with torch.no_grad():
        with kept_statistics(norm_groups):
            want = dense(X)
        before = model(X)
        try:
            result = dpf.prune(model, plan, keep, norm_groups=norm_groups, example_inputs=(X[:1],))
        except dpf.slicing.SliceError:
            assert torch.equal(model(X), before)
            raise
        got = model(X)
    assert sum(p.numel() for p in model.parameters()) == result.after.params < result.before.params
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * want.abs().max().item())
