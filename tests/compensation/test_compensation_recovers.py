"""Channels that others can stand in for are made up for exactly; nothing removed changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import CASES, Two, conv_case, double, image, relu_case, sliced
from torch import Tensor, nn

from diffprune_fast.compensation import compensate


def state(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("name", CASES)
def test_a_redundant_channel_is_made_up_for(name: str) -> None:
    dense, pruned, kept, x = CASES[name]()
    with torch.no_grad():
        assert (pruned(x) - dense(x)).abs().max() > 1e-2
        found = compensate(pruned, dense, kept=kept, calibration=[(x,)], ridge=1e-13, progress=False)
        other = x.flip(0) * 0.7 + 0.1
        torch.testing.assert_close(pruned(other), dense(other), rtol=0, atol=1e-6)
    assert found.helped
    assert found.compensated < 1e-12 < found.sliced


def test_a_channel_mixing_makes_up_for_a_redundant_channel() -> None:
    for case in (conv_case, relu_case):
        dense, pruned, kept, x = case()
        found = compensate(pruned, dense, kept=kept, calibration=[(x,)], ridge=1e-13, mode="channels", progress=False)
        torch.testing.assert_close(pruned(x), dense(x), rtol=0, atol=1e-6)
        assert found.mode == "channels"


def test_nothing_removed_changes_no_weight() -> None:
    dense = double(Two(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3)))
    pruned = sliced(dense, {})
    for kept in ({}, {("second.weight", 1): np.arange(8), ("first.weight", 0): np.arange(8)}):
        before = state(pruned)
        found = compensate(pruned, dense, kept=kept, calibration=[(image(),)], progress=False)
        assert same(pruned, before)
        assert (found.layers, found.helped) == ((), False)
        assert found.sliced == found.compensated == 0


def test_two_layers_in_a_row_are_solved_from_what_the_first_gives() -> None:
    """The second layer's inputs are right only once the first has its new weights."""
    net = double(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)))
    with torch.no_grad():
        for layer, row in ((net[0], 2), (net[1], 5)):
            for p in (layer.weight, layer.bias):
                p[row] = p[0] - 2 * p[7]
    first, second = np.delete(np.arange(8), 2), np.delete(np.arange(8), 5)
    kept = {("0.weight", 0): first, ("0.bias", 0): first, ("1.weight", 1): first, ("1.weight", 0): second}
    kept |= {("1.bias", 0): second, ("2.weight", 1): second}
    pruned = sliced(net, kept)
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = compensate(pruned, net, kept=kept, calibration=[x[:30], x[30:]], ridge=1e-13, progress=False)
    assert found.layers == ("1", "2")
    torch.testing.assert_close(pruned(x), net(x), rtol=0, atol=1e-6)


def test_rows_that_slicing_scaled_are_solved_for_scaled_outputs() -> None:
    """A projection to queries whose head shrank carries the softmax scale's factor; so do its targets."""
    dense, pruned, kept, x = conv_case()
    with torch.no_grad():
        for p in (pruned.second.weight, pruned.second.bias):
            p[1:3] *= 0.75**0.5
    compensate(pruned, dense, kept=kept, calibration=[(x,)], ridge=1e-13, progress=False)
    wanted = dense(x)
    wanted[:, 1:3] *= 0.75**0.5
    torch.testing.assert_close(pruned(x), wanted, rtol=0, atol=1e-6)


def test_half_precision_weights_keep_their_dtype_and_get_better() -> None:
    dense, pruned, kept, x = conv_case()
    dense, pruned, x = dense.bfloat16(), pruned.bfloat16(), x.bfloat16()
    found = compensate(pruned, dense, kept=kept, calibration=[(x,)], progress=False)
    assert pruned.second.weight.dtype == torch.bfloat16
    assert found.compensated < 1e-3 < found.sliced


def test_channels_last_weights_stay_channels_last() -> None:
    dense, pruned, kept, x = conv_case()
    pruned = pruned.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    compensate(pruned, dense, kept=kept, calibration=[(x,)], ridge=1e-13, progress=False)
    assert pruned.second.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(pruned(x), dense(x), rtol=0, atol=1e-6)


def test_a_layer_that_is_called_twice_is_solved_at_its_first_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shared = nn.Linear(9, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(self.first(x)) + self.shared(2 * self.first(x + 1))

    net = double(Twice())
    with torch.no_grad():
        for p in (net.first.weight, net.first.bias):
            p[3] = p[1] + p[6]
    k = np.delete(np.arange(8), 3)
    kept = {("first.weight", 0): k, ("first.bias", 0): k, ("shared.weight", 1): k}
    pruned = sliced(net, kept)
    x = torch.randn(60, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = compensate(pruned, net, kept=kept, calibration=[{"x": x}], ridge=1e-13, progress=False)
    assert found.layers == ("shared",)
    torch.testing.assert_close(pruned(x), net(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 8), nn.LayerNorm(8)])
def test_a_norm_gets_the_line_from_its_normalised_inputs_to_the_dense_ones_outputs(norm: nn.Module) -> None:
    grouped = isinstance(norm, nn.GroupNorm)
    layer = (lambda a, b: nn.Conv2d(a, b, 1)) if grouped else nn.Linear
    dense = double(Two(layer(4, 8), layer(8, 3), norm))
    k = np.array([0, 1, 2, 4, 5, 6])
    places = [("first.weight", 0), ("first.bias", 0), ("between.weight", 0), ("between.bias", 0), ("second.weight", 1)]
    kept = dict.fromkeys(places, k)
    changes = {"between__num_channels": 6} if grouped else {"between__normalized_shape": (6,)}
    pruned = sliced(dense, kept, **changes)
    x = image(channels=4) if grouped else image(channels=4).movedim(1, -1)
    seen = x[:8]  # of twelve; the rest is held back
    with torch.no_grad():
        plain, wanted = pruned.first(seen), dense.between(dense.first(seen))
        ones = torch.ones(6, dtype=torch.float64)
        if grouped:
            u = nn.functional.group_norm(plain, 2, ones).movedim(1, -1).flatten(0, -2)
            y = wanted[:, k].movedim(1, -1).flatten(0, -2)
        else:
            u, y = nn.functional.layer_norm(plain, (6,), ones).flatten(0, -2), wanted[..., k].flatten(0, -2)
    found = compensate(pruned, dense, kept=kept, calibration=[(x,)], ridge=1e-13, progress=False)
    assert found.helped
    assert found.layers == ("between", "second")
    lines = np.stack([np.polyfit(u[:, i].numpy(), y[:, i].numpy(), 1) for i in range(6)])
    np.testing.assert_allclose(pruned.between.weight.detach().numpy(), lines[:, 0], rtol=1e-8)
    np.testing.assert_allclose(pruned.between.bias.detach().numpy(), lines[:, 1], rtol=1e-7, atol=1e-9)
