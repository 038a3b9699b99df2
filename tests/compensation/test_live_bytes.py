"""The memory of a forward's activations, against forwards whose tensors can be counted."""

from __future__ import annotations

import numpy as np
import torch
from planted import double, sliced
from torch import Tensor, nn

from diffprune_fast.compensation import compensate
from diffprune_fast.compensation.live_bytes import live_bytes

N = 1000


def test_the_most_that_lives_at_a_time_is_told() -> None:
    x = torch.ones(N)

    def call() -> Tensor:
        held = x * 2
        y = held * 3  # two
        y = y * 4  # three, then two
        return y + held  # three

    assert live_bytes(call) == 3 * 4 * N


def test_weights_and_views_are_no_activations() -> None:
    layer, x = nn.Linear(N, 10, bias=False), torch.ones(1, N)
    with torch.no_grad():
        assert live_bytes(lambda: layer(x).view(2, 5).T) == 4 * 10


def test_a_view_keeps_what_it_is_of() -> None:
    x = torch.ones(N)

    def call() -> Tensor:
        few = (x * 2)[:1]
        return x * few

    assert live_bytes(call) == 2 * 4 * N


class Wide(nn.Module):
    """A thousand channels in the middle that nothing was pruned of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.wide, self.out = (
            nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(4, 1000), nn.Linear(1000, 4)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.wide(self.second(self.first(x))))


def test_compensation_counts_them_for_all_its_inputs() -> None:
    dense = double(Wide())
    kept = {("first.weight", 0): np.arange(6), ("first.bias", 0): np.arange(6), ("second.weight", 1): np.arange(6)}

    def told(n: int) -> int:
        x = torch.rand(n, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return compensate(sliced(dense, kept), dense, kept=kept, calibration=[(x,)], progress=False).bytes

    more = told(600) - told(300)
    samples = 200  # two thirds of 300
    targets = 8 * 4 * samples
    assert 0 <= more - targets - 8 * 1000 * samples <= 8 * 20 * samples
