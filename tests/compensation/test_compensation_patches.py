"""Gathered rows are the rows that a convolution multiplies, and its solution is least squares' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffprune_fast.compensation.least_squares import Problem, solve
from diffprune_fast.compensation.patches import Patches, matrix_of, positions_of, values_at, weight_of

LAYERS: dict[str, Any] = {
    "linear": lambda: (nn.Linear(5, 4), (3, 7, 5)),
    "linear, one row": lambda: (nn.Linear(5, 4), (5,)),
    "1d": lambda: (nn.Conv1d(4, 6, 3, padding=2, dilation=2), (3, 4, 11)),
    "3d": lambda: (nn.Conv3d(2, 4, (3, 2, 1), padding=(1, 0, 0), stride=(1, 2, 1)), (2, 2, 5, 6, 3)),
    "2d, stride, padding, dilation": lambda: (nn.Conv2d(4, 6, 3, 2, 2, 2), (3, 4, 9, 8)),
    "same": lambda: (nn.Conv2d(4, 6, (2, 4), padding="same"), (2, 4, 6, 7)),
    "valid": lambda: (nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 6, 7)),
    "circular": lambda: (nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular"), (2, 4, 6, 7)),
    "reflect": lambda: (nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"), (2, 4, 6, 7)),
    "replicate, same": lambda: (nn.Conv1d(4, 6, 4, padding="same", padding_mode="replicate"), (2, 4, 9)),
    "grouped": lambda: (nn.Conv2d(6, 9, 3, padding=1, groups=3, bias=False), (2, 6, 5, 5)),
    "depthwise": lambda: (nn.Conv2d(6, 12, 3, padding=1, groups=6), (2, 6, 5, 5)),
    "one sample": lambda: (nn.Conv2d(4, 6, 3, padding=1), (4, 6, 7)),
    "channels last": lambda: (nn.Conv2d(4, 6, 3, padding=1).to(memory_format=torch.channels_last), (2, 4, 6, 7)),
}


def made(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    layer, shape = LAYERS[name]()
    layer = layer.double()
    x = torch.randn(shape, dtype=torch.float64)
    if "last" in name:
        x = x.to(memory_format=torch.channels_last)
    total = int(torch.Size(positions_of(layer, x)).numel())
    return layer, x, torch.arange(total)[torch.rand(total) < 0.6] if total > 1 else torch.arange(1)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_the_weight_are_the_layers_outputs(name: str) -> None:
    layer, x, rows = made(name)
    groups = getattr(layer, "groups", 1)
    patches = Patches(layer, x, rows, torch.float64)
    found = patches.chunk(0, len(rows)) @ matrix_of(layer.weight, groups, torch.float64)
    found = found.transpose(0, 1).reshape(len(rows), -1)
    if layer.bias is not None:
        found = found + layer.bias
    torch.testing.assert_close(found, values_at(layer, layer(x), rows))


@pytest.mark.parametrize("name", LAYERS)
def test_a_weight_comes_back_from_its_matrix(name: str) -> None:
    weight = made(name)[0].weight.detach()
    groups = getattr(made(name)[0], "groups", 1)
    back = weight_of(matrix_of(weight, groups, torch.float64), weight)
    assert torch.equal(back, weight)
    assert back.stride() == weight.stride()


def test_the_solution_is_that_of_unfolded_least_squares() -> None:
    torch.manual_seed(1)
    x = torch.randn(20, 4, 9, 8, dtype=torch.float64)
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2).double()
    y = layer(x).detach() + torch.randn(20, 6, 5, 4, dtype=torch.float64)
    unfolded = F.unfold(x, 3, dilation=2, padding=2, stride=2).transpose(1, 2).reshape(-1, 36)
    ones = torch.ones(len(unfolded), 1, dtype=torch.float64)
    best = torch.linalg.lstsq(torch.cat([unfolded, ones], 1), y.flatten(2).transpose(1, 2).reshape(-1, 6)).solution
    weight, bias = solved(layer, x, y, ridge=0.0)
    torch.testing.assert_close(weight, best[:-1].T.reshape(6, 4, 3, 3), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(bias, best[-1], rtol=1e-9, atol=1e-9)


def solved(layer: nn.Module, x: Tensor, y: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    rows = torch.arange(int(torch.Size(positions_of(layer, x)).numel()))
    weight, bias = solve(problem(layer, x, values_at(layer, y, rows), options.pop("ridge")), **options)
    return weight_of(weight, layer.weight.detach()), bias


def problem(layer: nn.Module, x: Tensor, targets: Tensor, ridge: float) -> Problem:
    rows = torch.arange(len(targets))
    patches = Patches(layer, x, rows, x.dtype)
    bias = None if layer.bias is None else layer.bias.detach()
    matrix = matrix_of(layer.weight, patches.groups, x.dtype)
    return Problem(patches, targets, matrix, bias, bias is not None, ridge, lambda t: t)


@pytest.mark.parametrize("name", ["grouped", "2d, stride, padding, dilation", "linear"])
def test_the_residual_is_orthogonal_to_the_inputs(name: str) -> None:
    layer, shape = LAYERS[name]()
    layer, torch_seed = layer.double(), torch.manual_seed(2)
    x = torch.randn(40, *shape[1:], dtype=torch.float64, generator=torch_seed) + 3
    y = layer(x).detach()
    rows = torch.arange(int(torch.Size(positions_of(layer, x)).numel()))
    targets = torch.randn(len(rows), y.shape[-1 if name == "linear" else 1], dtype=torch.float64)
    one = problem(layer, x, targets, 0.0)
    weight, bias = solve(one)
    inputs = one.patches.chunk(0, len(rows))
    residual = targets.view(len(rows), len(weight), -1).transpose(0, 1) - inputs @ weight
    if bias is not None:
        residual = residual - bias.view(len(weight), 1, -1)
        assert residual.mean(1).abs().max() < 1e-10
    assert (inputs.mT @ residual / len(rows)).abs().max() < 1e-9


def test_the_size_of_chunks_changes_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    layer = nn.Conv2d(4, 6, 3, padding=1).double()
    x = torch.randn(30, 4, 6, 7, dtype=torch.float64) + 5
    y = torch.randn(30, 6, 6, 7, dtype=torch.float64)
    whole, offset = solved(layer, x, y, ridge=1e-3)
    monkeypatch.setattr(Patches, "chunk_rows", lambda self: 37)
    pieces, other = solved(layer, x, y, ridge=1e-3)
    torch.testing.assert_close(pieces, whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(other, offset, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["grouped", "2d, stride, padding, dilation", "linear"])
def test_conjugate_gradients_come_near_the_factorisation(name: str) -> None:
    layer, shape = LAYERS[name]()
    layer = layer.double()
    torch.manual_seed(4)
    x = torch.randn(40, *shape[1:], dtype=torch.float64) + 2
    y = torch.randn_like(layer(x))
    exact, offset = solved(layer, x, y, ridge=1e-2)
    near, other = solved(layer, x, y, ridge=1e-2, gradients=True)
    assert (near - exact).norm() < 1e-3 * (exact - layer.weight).norm()
    if offset is not None:
        torch.testing.assert_close(other, offset, rtol=1e-2, atol=1e-3)
