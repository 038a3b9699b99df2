"""``slice_channels_``: every provider keeps the same 70 % of both dims, exactly, before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import unet_configs
from torch import Tensor, nn

from diffprune_fast import ops


def keep(n: int) -> Tensor:
    return torch.randperm(n)[: max(1, n * 7 // 10)].sort().values


def plan_of(shapes: Sequence[Sequence[int]]) -> list[ops.Slice]:
    """The same indices for equal sizes, as in a model: dims of 3 and 4 (images, latents) stay."""
    table: dict[int, Tensor] = {}
    return [ops.Slice({d: table.setdefault(n, keep(n)) for d, n in enumerate(shape[:2]) if n > 4}) for shape in shapes]


def with_torch_pruning(tensors: list[Tensor], slices: list[ops.Slice]) -> list[Tensor]:
    """What Torch-Pruning does to one layer's weight: its own pruning functions, one dim after the other."""
    import torch_pruning as tp

    outs = []
    for tensor, piece in zip(tensors, slices):
        layer: nn.Module
        with torch.device("meta"):
            if tensor.dim() == 4:
                layer = nn.Conv2d(tensor.shape[1], tensor.shape[0], tensor.shape[2], bias=False)
                prune = tp.prune_conv_out_channels, tp.prune_conv_in_channels
            else:
                layer = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False)
                prune = tp.prune_linear_out_channels, tp.prune_linear_in_channels
        layer.weight = nn.Parameter(tensor)
        for dim, index in piece.keep.items():
            gone = sorted(set(range(tensor.shape[dim])) - set(index.tolist()))
            prune[dim](layer, gone)
        outs.append(layer.weight.detach())
    return outs


def provider(name: str) -> Callable[[list[Tensor], list[ops.Slice]], list[Tensor]]:
    """A function that consumes the tensors and returns the sliced ones."""
    if name == "torch_pruning":
        return with_torch_pruning
    if name == "torch.compile":
        torch._dynamo.reset()
        pick = torch.compile(lambda t, rows, cols: t.index_select(0, rows).index_select(1, cols))
        return lambda tensors, slices: [pick(t, s.keep[0], s.keep[1]) for t, s in zip(tensors, slices)]

    def run(tensors: list[Tensor], slices: list[ops.Slice]) -> list[Tensor]:
        ops.slice_channels_(tensors, slices, backend=name)
        return tensors

    return run


def check_and_time(
    timed: Any, operation: str, label: str, name: str, shapes: Any, dtype: torch.dtype, rounds: int
) -> None:
    torch.manual_seed(0)
    slices = plan_of(shapes)
    originals = [torch.randn(tuple(shape), dtype=torch.float32).to(dtype) for shape in shapes]
    work = provider(name)
    for original, piece in zip(originals, slices):
        expected = ops.reference.slice_channels(original, piece)
        assert torch.equal(work([original.clone()], [piece])[0], expected)
    # what has to be read are the kept rows, what has to be written is what stays
    size = originals[0].element_size()
    read = sum(t.numel() // t.shape[0] * len(s.keep.get(0, t)) for t, s in zip(originals, slices))
    written = sum(ops.reference.slice_channels(t, s).numel() for t, s in zip(originals, slices))
    timed(
        operation, label, name, work, n_bytes=size * (read + written), error=0.0, rounds=rounds,
        setup=lambda: (([t.clone() for t in originals], slices), {}),
    )  # fmt: skip


LAYERS = [(m, s) for m, shapes in unet_configs.LAYERS.items() for s in shapes]


@pytest.mark.parametrize("name", ["reference", "torch.compile", "torch_pruning", "cpu"])
@pytest.mark.parametrize(("model", "shape"), LAYERS, ids=lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else v)
def test_layer(timed, model: str, shape: tuple[int, ...], name: str) -> None:
    label = f"{model} {'x'.join(map(str, shape))}"
    check_and_time(timed, "slice_channels, one layer", label, name, [shape], torch.float32, 7)


# SDXL in bfloat16, so that original and copy fit in 24 GB beside each other.
WHOLE = [
    ("cifar", torch.float32, 7),
    ("lsun", torch.float32, 5),
    ("sd15", torch.float32, 3),
    ("sdxl", torch.bfloat16, 3),
]


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize(("model", "dtype", "rounds"), WHOLE, ids=[w[0] for w in WHOLE])
def test_whole_model(timed, model: str, dtype: torch.dtype, rounds: int, name: str) -> None:
    label = f"{model} whole, {str(dtype).removeprefix('torch.')}"
    shapes = unet_configs.parameter_shapes(model)
    check_and_time(timed, "slice_channels, whole model", label, name, shapes, dtype, rounds)
