"""What labels don't show: where it runs, what is handed out, what is kept outside of it, what a width decides."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_exact
from torch import Tensor, nn

import diffprune_fast as dpf
from diffprune_fast.tracing import TraceError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


class Net(nn.Module):
    """a -> ``between`` -> b, and whatever ``out`` makes of both."""

    def __init__(
        self, between: Callable[[Tensor], Tensor], out: Callable[[Tensor, Tensor], Any] = lambda h, y: y
    ) -> None:
        super().__init__()
        self.between, self.out = between, out
        self.free, self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 1), nn.Conv2d(32, 3, 1)

    def forward(self, x: Tensor) -> Any:
        h = self.a(F.silu(self.free(x)))
        return self.out(h, self.b(self.between(h)))


class Beside(nn.Module):
    """``timed`` changes something without channels, by the width of something that has them."""

    def __init__(self, timed: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.timed = timed
        self.a, self.t, self.o = nn.Conv2d(3, 32, 1), nn.Linear(40, 32), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.a(x)
        return self.o(F.silu(h + self.t(self.timed(t, h.shape[1]))[:, :, None, None]))


def in_loops(t: Tensor, width: int) -> Tensor:
    for _ in range(width // 2):
        t = t * 0.5
    return t


def written(t: Tensor, width: int) -> Tensor:
    mask = torch.ones_like(t)
    mask[:, : width // 2] = 0.5
    return t * mask


def narrowed(t: Tensor, width: int) -> Tensor:
    mask = torch.ones_like(t)
    mask.narrow(1, 0, width // 2).zero_()
    return t * mask


BESIDE: dict[str, Callable[[Tensor, int], Tensor]] = {
    "a branch": lambda t, width: t / 10 if width > 31 else t,
    "a branch of two": lambda t, width: t / 10 if width > 31 else t * 2 + 1,
    "a loop": in_loops,
    "a write into a slice": written,
    "a write into a narrowed view": narrowed,
}


@pytest.mark.parametrize("name", BESIDE)
def test_a_width_stays_that_decides_about_tensors_without_channels(name: str) -> None:
    plan = dpf.trace(Beside(BESIDE[name]).double(), (X, torch.randn(2, 40).double()))
    assert not plan.groups
    assert "would change: it follows the width" in plan.frozen["a.weight:0"]


@pytest.mark.parametrize("side", [64, 72])
def test_a_table_of_numpy_that_follows_a_width_keeps_it(side: int) -> None:
    def table(h: Tensor) -> Tensor:
        numbers = np.linspace(0, 1, side * side) / h.shape[1]
        return h * torch.from_numpy(numbers).view(side, side).to(h)

    plan = dpf.trace(Net(table).double(), (torch.randn(1, 3, side, side).double(),))
    assert [group.name for group in plan.groups] == ["free"]


@pytest.mark.parametrize(
    "here",
    [
        lambda h: h.device.type == "cpu",
        lambda h: h.device == torch.device("cpu"),
        lambda h: not h.is_meta,
        lambda h: h.is_cpu,
        lambda h: h.get_device() == -1,
    ],
)
def test_a_branch_on_where_it_runs_is_the_branch_of_a_real_call(here: Callable[[Tensor], bool]) -> None:
    plan = dpf.trace(Net(lambda h: h.softmax(1) if here(h) else h).double(), (X,))
    assert [group.name for group in plan.groups] == ["free"]


def test_ids_that_a_forward_makes_on_its_device_can_be_read() -> None:
    def scaled(h: Tensor) -> Tensor:
        ids = torch.arange(h.shape[2], device=h.device)
        return h if (ids[1:] > ids[:-1]).all() else h.softmax(1)

    model = Net(scaled)
    assert_exact(model, lambda m: m(X), example_inputs=(X[:1],))
    assert model.a.out_channels < 32


def test_a_mask_that_was_filled_from_activations_has_no_values_to_read() -> None:
    def masked(h: Tensor) -> Tensor:
        mask = torch.zeros(h.shape[2], dtype=torch.bool, device=h.device)
        mask[:] = h[0, 0, 0] > 0
        return h if mask.any() else h.softmax(1)

    with pytest.raises(TraceError, match="reads values of an activation"):
        dpf.trace(Net(masked), (X.float(),))


class Slots:
    __slots__ = ("h", "y")

    def __init__(self, h: Tensor, y: Tensor) -> None:
        self.h, self.y = h, y


HOLDERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "deque": lambda h, y: collections.deque([h, y]),
    "set": lambda h, y: {h, y},
    "values of a dict": lambda h, y: {"h": h, "y": y}.values(),
    "slots": Slots,
    "mapping": lambda h, y: collections.ChainMap({"h": h}, {"y": y}),
    "closure": lambda h, y: lambda: (h, y),
    "partial": lambda h, y: functools.partial(torch.add, h, y),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_outputs_are_found_in(name: str) -> None:
    plan = dpf.trace(Net(lambda h: h, HOLDERS[name]), (X.float(),))
    assert [group.name for group in plan.groups] == ["free"]


def test_a_container_that_cannot_be_looked_into_is_refused() -> None:
    with pytest.raises(TraceError, match="returns a generator, in which outputs can't be looked for"):
        dpf.trace(Net(lambda h: h, lambda h, y: (t for t in (h, y))), (X.float(),))


def test_latents_of_an_autoencoder_traced_through_its_forward_stay() -> None:
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False]
    )
    x = torch.randn(1, 3, 1, 16, 16)
    plan = dpf.trace(vae, (x,))
    keep = dpf.select(plan, np.random.default_rng(0).random(plan.n_units), ratio=0.4).keep
    before = vae.encode(x).latent_dist.mode().shape
    dpf.prune(vae, plan, keep, example_inputs=(x,))
    assert vae.encode(x).latent_dist.mode().shape == before


class Extractor(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.free(x)
        return self.b(self.a(self.kept))

    def features(self, x: Tensor) -> Tensor:
        return self.a(self.free(x))


def test_features_in_attributes_and_other_methods_are_named() -> None:
    model = Extractor(lambda h: h)
    attribute, method = dpf.trace(model, (X.float(),)).notes
    assert "leaves activations in kept" in attribute
    assert "other methods that use its layers (features)" in method
    result = dpf.prune(model, plan := dpf.trace(model, (X.float(),)), {}, example_inputs=(X.float(),))
    assert all(note in str(result) for note in plan.notes)
    assert dpf.Plan.from_json(plan.to_json()) == plan


def test_several_calls_are_traced_together() -> None:
    calls = [("forward", (X.float(),), {}), ("features", (X.float(),), {})]
    plan = dpf.trace(Extractor(lambda h: h), calls)
    assert [group.name for group in plan.groups] == ["free"]
    assert not any("other methods" in note for note in plan.notes)


KEPT: dict[Any, Tensor] = {}
ONE: Tensor | None = None


@functools.lru_cache(None)
def table(n: int, dtype: torch.dtype) -> Tensor:
    return torch.arange(n, dtype=dtype)


def in_a_dictionary(h: Tensor) -> Tensor:
    if h.shape[2] not in KEPT:
        KEPT[h.shape[2]] = torch.arange(h.shape[2], device=h.device, dtype=h.dtype)
    return h * KEPT[h.shape[2]]


def in_a_global(h: Tensor) -> Tensor:
    global ONE
    if ONE is None:
        ONE = torch.arange(h.shape[2], device=h.device, dtype=h.dtype)
    return h * ONE


def in_a_closure() -> Callable[[Tensor], Tensor]:
    kept: list[Tensor] = []

    def times(h: Tensor) -> Tensor:
        if not kept:
            kept.append(torch.arange(h.shape[2], device=h.device, dtype=h.dtype))
        return h * kept[0]

    return times


class WithTables(nn.Module):
    how = staticmethod(in_a_closure())

    def __init__(self, how: str) -> None:
        super().__init__()
        self.name, self.a, self.b = how, nn.Conv2d(3, 16, 1), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        ways = {
            "dictionary": in_a_dictionary,
            "global": in_a_global,
            "closure": self.how,
            "lru_cache": lambda h: h * table(h.shape[2], h.dtype).to(h.device),
        }
        return self.b(ways[self.name](h))


@pytest.mark.parametrize("how", ["dictionary", "global", "closure", "lru_cache"])
def test_no_tensor_of_a_walk_is_left_in_a(how: str) -> None:
    model = WithTables(how)
    plan = dpf.trace(model, (X.float(),))
    assert [group.n_units for group in plan.groups] == [16]
    model(X.float()).sum().backward()
    dpf.prune(model, plan, {"a": np.arange(8)}, example_inputs=(X.float(),))
    assert model.a.out_channels == 8


@pytest.mark.parametrize(("outputs", "heads"), [(8, None), (24, 2)])
def test_a_whole_group_of_a_convolution_stays(outputs: int, heads: int | None) -> None:
    """Its inputs are the model's own; without one group's outputs the other groups would answer in its place."""

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grouped, self.last = nn.Conv2d(16, outputs, 1, groups=8), nn.Conv2d(outputs, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.grouped(x)
            if heads:  # each of 12 channels, four groups, which go together
                y = (y.unflatten(1, (heads, -1)) * torch.ones(heads, 12, 1, 1)).flatten(1, 2)
            return self.last(y)

    torch.manual_seed(0)
    model, x = Grouped().eval(), (torch.randn(1, 16, 2, 2),)
    plan = dpf.trace(model, x)
    keep = dpf.select(plan, np.arange(plan.n_units, dtype=float), ratio=0.3, round_to=1).keep if plan.groups else {}
    result = dpf.prune(model, plan, keep, inplace=False, example_inputs=x)
    assert result.model.grouped.weight.shape[0] % 8 == 0
    if outputs == 8:
        assert result.model.grouped.weight.shape == model.grouped.weight.shape
