"""Numbers that a forward makes of a width: where one would change, the width stays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_exact, randomised
from torch import Tensor, nn

import diffprune_fast as dpf
from diffprune_fast.architectures.inputs import calls_of
from diffprune_fast.plan import sliced_shapes
from diffprune_fast.slicing import SliceError
from diffprune_fast.tracing import GateError, pass_gate
from diffprune_fast.tracing.channels import Nodes
from diffprune_fast.tracing.graph import Graph
from diffprune_fast.tracing.grouping import build_plan
from diffprune_fast.tracing.tracer import follow

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
Between = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """free -> a -> ``between`` -> b: the width of ``a`` is what ``between`` sees, 32 channels."""

    def __init__(self, between: Between) -> None:
        super().__init__()
        self.between = between
        self.free = nn.Conv2d(3, 16, 3, padding=1)
        self.a, self.b = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(F.silu(self.free(x)))))


def like(h: Tensor) -> dict[str, object]:
    return {"dtype": h.dtype, "device": h.device}


def layer_norm(h: Tensor, eps: float) -> Tensor:
    return F.layer_norm(h.movedim(1, -1), (h.shape[1],), eps=eps).movedim(-1, 1)


def dilated(h: Tensor) -> Tensor:
    return F.max_pool2d(h, 5, 1, padding=h.shape[1] // 16)[..., :4, :4]


def resized(h: Tensor) -> Tensor:
    return F.interpolate(F.interpolate(h, scale_factor=h.shape[1] / 16), size=h.shape[2:])


def copies(h: Tensor) -> Tensor:
    return (h[None] * torch.ones(h.shape[1], 1, 1, 1, 1, **like(h))).sum(0)


def filled(h: Tensor) -> Tensor:
    return h * torch.empty(1, 1, 1, 1, **like(h)).fill_(h.shape[1])


def once_more(h: Tensor) -> Tensor:
    return h.relu().sqrt() if h.shape[1] == 32 else h.relu()


def dropping_a_step(h: Tensor) -> Tensor:
    return h.sigmoid() if h.shape[1] == 32 else h


FOLLOWING: dict[str, Between] = {
    "a tensor of one element": lambda h: h / torch.tensor([float(h.shape[1])], **like(h)),
    "a scalar": lambda h: h / torch.tensor(float(h.shape[1]), **like(h)),
    "a new tensor": lambda h: h * h.new_tensor([h.shape[1]]),
    "a tensor of a list": lambda h: h * torch.as_tensor([h.shape[1] ** -0.5], **like(h)),
    "a tensor that is not on the device": lambda h: h * torch.tensor([float(h.shape[1])]).to(h),
    "one number that fills": lambda h: h * torch.full((1, 1), float(h.shape[1]), **like(h)),
    "one number that is filled in": filled,
    "a sum of ones": lambda h: h / torch.ones(h.shape[1], **like(h)).sum(),
    "a mean of ids": lambda h: h * torch.arange(h.shape[1], **like(h)).mean(),
    "the last of the ids": lambda h: h * torch.arange(h.shape[1], **like(h))[-1],
    "an id": lambda h: h * torch.arange(h.shape[1], h.shape[1] + 1, **like(h)),
    "a sum over copies": copies,
    "the epsilon of a norm": lambda h: layer_norm(h, h.shape[1] / 100),
    "the groups of a norm": lambda h: F.group_norm(h, h.shape[1] // 4),
    "a slope": lambda h: F.leaky_relu(h, h.shape[1] / 100),
    "a window": lambda h: F.avg_pool2d(h, 2 * (h.shape[1] // 16) + 1, 1, h.shape[1] // 16),
    "a window's padding": dilated,
    "a scale factor": resized,
    "a size": lambda h: F.adaptive_avg_pool2d(h, h.shape[1] // 4),
    "a number of pixels": lambda h: h[..., : h.shape[1] // 4],
    "a number of copies": lambda h: h.repeat(1, 1, h.shape[1] // 16, 1),
    "a branch": lambda h: h.relu() if h.shape[1] == 32 else h.sigmoid(),
    "a branch with one more step": once_more,
    "a step that is left out": dropping_a_step,
}


@pytest.mark.parametrize("name", FOLLOWING)
def test_a_width_that_a_number_follows_stays(name: str) -> None:
    model = Net(FOLLOWING[name])
    result = assert_exact(model, lambda m: m(X), example_inputs=(X[:1],))
    assert (model.a.out_channels, result.plan["free"].n_units) == (32, 16)
    assert model.free.out_channels < 16
    assert "would change: it follows the width" in result.plan.frozen["a.weight:0"]


@pytest.mark.parametrize("name", ["a tensor of one element", "a sum of ones", "the groups of a norm", "a branch"])
def test_the_gate_refuses_a_keep_set_that_changes_a_number(name: str) -> None:
    model = randomised(Net(FOLLOWING[name]))
    calls = calls_of(model, (X[:1],))
    walk = follow(model, nodes := Nodes.of(model), Graph(nodes.total), calls)
    plan = build_plan(model, walk)  # not probed
    fewer = {"a": np.arange(0, 32, 2)}
    with pytest.raises(GateError, match=r"used in model \(.*\) would change: it follows the width"):
        pass_gate(model, plan, sliced_shapes(model, plan, fewer), "count", calls)
    pass_gate(model, plan, sliced_shapes(model, plan, {"free": np.arange(5)}), "count", calls)


def test_a_number_that_takes_a_step_is_refused_when_pruning_reaches_it() -> None:
    model = Net(lambda h: h * (h.shape[1] // 20))
    plan = dpf.trace(model, (X[:1].float(),))
    before = {n: p.shape for n, p in model.named_parameters()}
    with pytest.raises(SliceError, match=r"a number used in model \(mul\) would change"):
        dpf.prune(model, plan, {"a": np.arange(19)}, example_inputs=(X[:1].float(),))
    assert {n: p.shape for n, p in model.named_parameters()} == before
    dpf.prune(model, plan, {"a": np.arange(20)}, example_inputs=(X[:1].float(),))
    assert model.a.out_channels == 20


def depthwise(h: Tensor) -> Tensor:
    return F.conv2d(h.reshape(-1, 1, *h.shape[2:]), torch.ones(1, 1, 3, 3, **like(h)), padding=1).view(h.shape)


HARMLESS: dict[str, Between] = {
    "sizes of views": lambda h: h.view(h.shape[0], h.shape[1], -1).transpose(1, 2).reshape(-1, h.shape[1]).view(
        h.shape[0], 64, h.shape[1]).transpose(1, 2).unflatten(2, (8, 8)),
    "an instance norm": lambda h: F.group_norm(h, h.shape[1]),
    "a norm over all channels": lambda h: layer_norm(h, 1e-5),
    "zeros of that length": lambda h: h + torch.zeros(h.shape[1], 1, 1, **like(h)),
    "an expansion": lambda h: h * torch.full((1, 1, 1), 0.5, **like(h)).expand(h.shape[1], 8, 8),
    "a convolution of each": depthwise,
    "equal pieces": lambda h: torch.cat([p.sigmoid() for p in h.split(h.shape[1] // 2, dim=1)], 1),
    "numbers of one's own": lambda h: h * torch.tensor([0.5], **like(h)) + h.new_tensor(2.0),
    "a size of the image": lambda h: h / h.shape[-1],
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_sizes_that_are_nothing_but_sizes_leave_the_width_free(name: str) -> None:
    model = Net(HARMLESS[name])
    assert_exact(model, lambda m: m(X), example_inputs=(X[:1],))
    assert model.a.out_channels < 32


def written(h: Tensor, write: Callable[[Tensor], object]) -> Tensor:
    z = torch.zeros(1, h.shape[1], 1, 1, **like(h))
    write(z)
    return h * z


PARTS: dict[str, Callable[[Tensor], object]] = {
    "narrow": lambda z: z.narrow(1, 0, z.shape[1] // 2).fill_(1.0),
    "chunk": lambda z: z.chunk(2, 1)[0].add_(1.0),
    "split": lambda z: z.split(z.shape[1] // 2, 1)[0].add_(1.0),
    "unbind": lambda z: z.unbind(1)[0].fill_(1.0),
    "flatten": lambda z: z.flatten()[::2].fill_(1.0),
}


@pytest.mark.parametrize("name", PARTS)
def test_made_tensors_that_are_written_through_a_part_keep_the_channels(name: str) -> None:
    model = Net(lambda h: written(h, PARTS[name]))
    assert_exact(model, lambda m: m(X), example_inputs=(X[:1],))
    assert model.a.out_channels == 32
    assert model.free.out_channels < 16


class Cached(Net):
    """Keeps a table that its first forward makes."""

    table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(0, 1, 8, dtype=x.dtype, device=x.device) * 2
        return super().forward(x) + self.table


def test_a_table_that_is_cached_after_tracing_changes_nothing() -> None:
    model = Cached(lambda h: h)
    plan = dpf.trace(model, (X[:1].float(),))
    model(X.float())
    dpf.prune(model, plan, {"a": np.arange(20)}, example_inputs=(X[:1].float(),))
    assert model.a.out_channels == 20


def test_pruning_may_look_at_other_inputs_than_tracing() -> None:
    model = Net(lambda h: h.flatten(2).mul(1 / h.shape[-1]).unflatten(2, h.shape[2:]))
    plan = dpf.trace(model, (X[:1].float(),))
    dpf.prune(model, plan, {"a": np.arange(20)}, example_inputs=(X[:, :, :4, :6].float(),))
    assert model.a.out_channels == 20
