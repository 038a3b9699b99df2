"""``slice_channels_``: every provider keeps the same 70 % of both dims, exactly, before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import measured
import numpy as np
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


def both_dims(tensor: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """What torch.compile gets: the same slice, written for one tensor."""
    tensor = tensor if rows is None else tensor.index_select(0, rows)
    return tensor if cols is None else tensor.index_select(1, cols)


def provider(name: str, many: bool) -> Callable[[list[Tensor], list[ops.Slice]], list[Tensor]]:
    """A function that consumes the tensors and returns the sliced ones."""
    if name == "torch_pruning":
        return with_torch_pruning
    if name == "torch.compile":
        torch._dynamo.reset()
        torch._dynamo.config.cache_size_limit = 64  # the ranks of a whole model's tensors, and which dims are sliced
        pick = torch.compile(both_dims, dynamic=many)
        return lambda tensors, slices: [pick(t, s.keep.get(0), s.keep.get(1)) for t, s in zip(tensors, slices)]

    def run(tensors: list[Tensor], slices: list[ops.Slice]) -> list[Tensor]:
        ops.slice_channels_(tensors, slices, backend=name)
        return tensors

    return run


def check_and_time(
    compared: Any, operation: str, label: str, names: Sequence[str], shapes: Any, dtype: torch.dtype, rounds: int
) -> list[measured.Row]:
    torch.manual_seed(0)
    slices = plan_of(shapes)
    originals = [torch.randn(tuple(shape), dtype=torch.float32).to(dtype) for shape in shapes]
    works = {}
    for name in names:
        slicing = provider(name, len(shapes) > 1)
        for original, piece in zip(originals, slices):
            expected = ops.reference.slice_channels(original, piece)
            assert torch.equal(slicing([original.clone()], [piece])[0], expected)
        works[name] = measured.work(slicing, lambda: ([t.clone() for t in originals], slices))
    # what has to be read are the kept rows, what has to be written is what stays
    size = originals[0].element_size()
    read = sum(t.numel() // t.shape[0] * len(s.keep.get(0, t)) for t, s in zip(originals, slices))
    written = sum(ops.reference.slice_channels(t, s).numel() for t, s in zip(originals, slices))
    errors = dict.fromkeys(names, 0.0)
    return compared(operation, label, works, n_bytes=size * (read + written), errors=errors, rounds=rounds)


def overhead_us() -> float:
    """What a call costs that has nothing to move."""
    slicing = provider("cpu", False)
    some = ops.Slice({0: torch.arange(7), 1: torch.arange(7)})
    run = measured.work(slicing, lambda: ([torch.ones(10, 10)], [some]))
    return float(np.median([run() for _ in range(51)])) * 1e6


LAYERS = [(m, s) for m, shapes in unet_configs.LAYERS.items() for s in shapes]


@pytest.mark.parametrize(("model", "shape"), LAYERS, ids=lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else v)
def test_layer(compared, model: str, shape: tuple[int, ...]) -> None:
    label = f"{model} {'x'.join(map(str, shape))}"
    names = ["reference", "torch.compile", "torch_pruning", "cpu"]
    rows = check_and_time(compared, "slice_channels, one layer", label, names, [shape], torch.float32, 7)
    rows[-1].notes["us of the call without its work"] = overhead_us()


# SDXL in bfloat16, so that original and copy fit in 24 GB beside each other.
WHOLE = [
    ("cifar", torch.float32, 7),
    ("lsun", torch.float32, 5),
    ("sd15", torch.float32, 3),
    ("sdxl", torch.bfloat16, 3),
]


@pytest.mark.parametrize(("model", "dtype", "rounds"), WHOLE, ids=[w[0] for w in WHOLE])
def test_whole_model(compared, model: str, dtype: torch.dtype, rounds: int) -> None:
    label = f"{model} whole, {str(dtype).removeprefix('torch.')}"
    names = ["reference", "torch.compile", "cpu"] if model in ("cifar", "lsun") else ["reference", "cpu"]
    shapes = unet_configs.parameter_shapes(model)
    check_and_time(compared, "slice_channels, whole model", label, names, shapes, dtype, rounds)
