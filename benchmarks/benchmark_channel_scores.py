"""``channel_scores_``: every provider on the same weights and gradients, checked against float64 before it is timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import measured
import pytest
import torch
import unet_configs
from torch import Tensor, nn

from diffprune_fast import ops

STEPS = 8


def entry(shape: Sequence[int], first_unit: int) -> ops.ScoreEntry:
    """Every channel its own unit, so that every sum is compared."""
    outer, inner = shape[0], shape[1] if len(shape) > 1 else 1
    rows = torch.arange(first_unit, first_unit + outer, dtype=torch.int32)
    cols = torch.arange(first_unit + outer, first_unit + outer + inner, dtype=torch.int32)
    return ops.ScoreEntry((outer, inner, math.prod(shape[2:])), rows, cols if len(shape) > 1 else None)


def table_of(shapes: Sequence[Sequence[int]]) -> ops.ScoreTable:
    entries, n = [], 0
    for shape in shapes:
        entries.append(entry(shape, n))
        n += sum(shape[:2]) if len(shape) > 1 else shape[0]
    return ops.ScoreTable(entries, n)


def sums(theta: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """What torch.compile gets: the same formula, written for one parameter."""
    value = (theta * grad).abs()
    columns = value.sum([0, *range(2, value.dim())]) if value.dim() > 1 else value.sum()
    return (value.sum(list(range(1, value.dim()))) if value.dim() > 1 else value), columns


def stacked_sums(theta: Tensor, grads: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return sums(theta, (grads * weights.view(-1, *[1] * theta.dim())).sum(0))


class TorchPruning:
    """Torch-Pruning's own importance on one layer: its row sums and its column sums.

    The layer stands between two of one channel whose gradients are zero, because a group needs both sides.
    """

    def __init__(self, theta: Tensor, grad: Tensor) -> None:
        import torch_pruning as tp

        outer, inner = theta.shape[:2]
        if theta.dim() == 4:
            self.net = nn.Sequential(
                nn.Conv2d(1, inner, 1, bias=False),
                nn.Conv2d(inner, outer, theta.shape[2], padding=1, bias=False),
                nn.Conv2d(outer, 1, 1, bias=False),
            )
            inputs = torch.zeros(1, 1, 3, 3)
        else:
            self.net = nn.Sequential(
                *(nn.Linear(i, o, bias=False) for i, o in [(1, inner), (inner, outer), (outer, 1)])
            )
            inputs = torch.zeros(1, 1)
        self.net[1].weight.data = theta
        for layer in self.net:
            layer.weight.grad = torch.zeros_like(layer.weight)
        graph = tp.DependencyGraph().build_dependency(self.net, inputs)
        conv = theta.dim() == 4
        prune = tp.prune_conv_out_channels if conv else tp.prune_linear_out_channels
        self.groups = [
            graph.get_pruning_group(self.net[1], prune, list(range(outer))),
            graph.get_pruning_group(self.net[0], prune, list(range(inner))),
        ]
        self.net[1].weight.grad = grad
        self.importance = tp.importance.GroupTaylorImportance(group_reduction="sum", normalizer=None)

    def __call__(self) -> Tensor:
        return torch.cat([self.importance(group) for group in self.groups])


def provider(name: str, thetas: list[Tensor], grads: list[Tensor], weights: Tensor | None) -> Callable[[], Tensor]:
    """A function of no arguments that returns all scores."""
    table = table_of([t.shape for t in thetas])
    if name in ("cpu", "reference"):
        return lambda: ops.channel_scores_(
            torch.zeros(table.n_units, dtype=torch.float64),
            thetas,
            grads,
            table,
            timestep_weights=weights,
            backend=name,
        )
    if name == "torch_pruning":
        assert len(thetas) == 1
        return TorchPruning(thetas[0], grads[0])
    torch._dynamo.reset()
    if weights is not None:
        stacked = torch.compile(stacked_sums)
        return lambda: torch.cat(stacked(thetas[0], grads[0], weights))
    compiled = torch.compile(sums, dynamic=len(thetas) > 1)

    def run() -> Tensor:
        parts = []
        for theta, grad in zip(thetas, grads):
            rows, cols = compiled(theta, grad)
            parts += [rows, cols] if theta.dim() > 1 else [rows]
        return torch.cat(parts)

    return run


def truth(thetas: list[Tensor], grads: list[Tensor], weights: Tensor | None) -> Tensor:
    table = table_of([t.shape for t in thetas])
    scores = torch.zeros(table.n_units, dtype=torch.float64)
    for i, (theta, grad) in enumerate(zip(thetas, grads)):
        wide = None if weights is None else weights.double()
        ops.reference.channel_scores_(
            scores, [theta.double()], [grad.double()], table.subset([i]), timestep_weights=wide
        )
    return scores


def agree(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> float:
    error = float(((got.double() - wanted).abs() / wanted.clamp(min=1e-12)).max())
    assert error < 1e-4, f"differs from float64 by {error:.2g}"
    return error


def random_tensors(shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(tuple(shape), dtype=torch.float32).to(dtype) for shape in shapes]


LAYERS = [(model, shape) for model, shapes in unet_configs.LAYERS.items() for shape in shapes]


def check_and_time(
    compared: Any,
    operation: str,
    label: str,
    names: Sequence[str],
    given: tuple[list[Tensor], list[Tensor], Tensor | None],
    n_bytes: int,
    rounds: int = 7,
) -> None:
    works, errors, wanted = {}, {}, truth(*given)
    for name in names:
        call = provider(name, *given)
        errors[name] = agree(call(), wanted, given[0][0].dtype)
        works[name] = measured.work(call)
    compared(operation, label, works, n_bytes=n_bytes, errors=errors, rounds=rounds)


@pytest.mark.parametrize(("model", "shape"), LAYERS, ids=lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else v)
def test_layer(compared, model: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    given = random_tensors([shape]), random_tensors([shape]), None
    names = ["reference", "torch.compile", "torch_pruning", "cpu"]
    label = f"{model} {'x'.join(map(str, shape))}"
    check_and_time(compared, "channel_scores, one layer", label, names, given, 8 * given[0][0].numel())


@pytest.mark.parametrize("shape", [(1280, 1280, 3, 3), (1280, 5120)], ids=lambda s: "x".join(map(str, s)))
def test_stacked_gradients(compared, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    given = random_tensors([shape]), random_tensors([(STEPS, *shape)]), torch.rand(STEPS)
    label = f"{STEPS} x {'x'.join(map(str, shape))}"
    names = ["reference", "torch.compile", "cpu"]
    n_bytes = 4 * (STEPS + 1) * given[0][0].numel()
    check_and_time(compared, "channel_scores, stacked gradients", label, names, given, n_bytes)


# SDXL in bfloat16: its weights and gradients in float32 are 20 GB, and the reference needs as much again.
WHOLE = [
    ("cifar", torch.float32, 7),
    ("lsun", torch.float32, 5),
    ("sd15", torch.float32, 3),
    ("sdxl", torch.bfloat16, 3),
]


@pytest.mark.parametrize(("model", "dtype", "rounds"), WHOLE, ids=[w[0] for w in WHOLE])
def test_whole_model(compared, model: str, dtype: torch.dtype, rounds: int) -> None:
    """The layers of the large ones are compiled one by one above; hundreds of calls would measure the same."""
    torch.manual_seed(0)
    shapes = unet_configs.parameter_shapes(model)
    thetas, grads = random_tensors(shapes, dtype), random_tensors(shapes, dtype)
    names = ["reference", "torch.compile", "cpu"] if model in ("cifar", "lsun") else ["reference", "cpu"]
    n_bytes = 2 * sum(t.numel() * t.element_size() for t in thetas)
    label = f"{model} whole, {str(dtype).removeprefix('torch.')}"
    check_and_time(compared, "channel_scores, whole model", label, names, (thetas, grads, None), n_bytes, rounds)
