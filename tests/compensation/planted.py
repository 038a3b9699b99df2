"""Small networks with channels that are combinations of others, so that what is right after pruning is known."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kept = dict[tuple[str, int], np.ndarray]


def sliced(net: nn.Module, kept: Mapping[tuple[str, int], np.ndarray], **attributes: int) -> nn.Module:
    """A copy of ``net`` with only the kept channels. attributes: ``layer__name`` to the new value."""
    pruned = copy.deepcopy(net)
    for (name, dim), index in kept.items():
        path, _, leaf = name.rpartition(".")
        owner = pruned.get_submodule(path)
        p = getattr(owner, leaf)
        new = p.detach().index_select(dim, torch.from_numpy(np.asarray(index)))
        setattr(owner, leaf, nn.Parameter(new, requires_grad=p.requires_grad))
    for path, value in attributes.items():
        layer, name = path.split("__")
        setattr(pruned.get_submodule(layer), name, value)
    return pruned


def double(net: nn.Module, seed: int = 0) -> nn.Module:
    """The net in double precision with all parameters drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    net = net.double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return net


def without(index: int | list[int], n: int) -> np.ndarray:
    return np.setdiff1d(np.arange(n), np.atleast_1d(index))


def combine(layer: nn.Module, row: int, factors: Mapping[int, float]) -> None:
    """Make one output of a layer a combination of others."""
    with torch.no_grad():
        for p in (layer.weight, layer.bias):
            if p is not None:
                p[row] = sum(f * p[i] for i, f in factors.items())


class Two(nn.Module):
    """One layer after the other, with something in between."""

    def __init__(self, first: nn.Module, second: nn.Module, between: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.between = nn.Identity() if between is None else between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


class GEGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(6, 16), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = self.proj(x).chunk(2, dim=-1)
        return self.out(hidden * F.gelu(gate))


class Attention(nn.Module):
    """Two heads; values of four channels each."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8)
        self.to_out = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def image(n: int = 12, channels: int = 3, size: int = 9, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, size, size, generator=generator, dtype=torch.float64)


def conv_case() -> tuple[nn.Module, nn.Module, Kept, Tensor]:
    net = double(Two(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 3, padding=1, stride=2)))
    combine(net.first, 6, {1: 0.7, 4: -1.3})
    k = without(6, 8)
    kept = {("first.weight", 0): k, ("first.bias", 0): k, ("second.weight", 1): k}
    return net, sliced(net, kept, second__in_channels=7), kept, image()


def relu_case() -> tuple[nn.Module, nn.Module, Kept, Tensor]:
    net = double(Two(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1, bias=False), nn.ReLU()))
    combine(net.first, 2, {5: 2.5})
    k = without(2, 8)
    kept = {("first.weight", 0): k, ("first.bias", 0): k, ("second.weight", 1): k}
    return net, sliced(net, kept, second__in_channels=7), kept, image()


def grouped_case() -> tuple[nn.Module, nn.Module, Kept, Tensor]:
    net = double(Two(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1, groups=2)))
    combine(net.first, 3, {0: 1.5, 2: -0.5})
    combine(net.first, 7, {4: 0.5, 5: 0.5})
    k = without([3, 7], 8)
    kept = {("first.weight", 0): k, ("first.bias", 0): k, ("second.weight", 1): np.arange(3)}
    return net, sliced(net, kept, second__in_channels=6), kept, image()


def norm_case() -> tuple[nn.Module, nn.Module, Kept, Tensor]:
    """The norm's last group is its first one scaled, which the norm takes away again.

    The consumer pads nothing: the norm's offsets make the copies differ by a constant, which zeros around it haven't.
    """
    net = double(Two(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 3), nn.GroupNorm(4, 8, eps=0.0)))
    for a, b in ((6, 0), (7, 1)):
        combine(net.first, a, {b: 3.0})
    k = np.arange(6)
    places = [("first.weight", 0), ("first.bias", 0), ("between.weight", 0), ("between.bias", 0), ("second.weight", 1)]
    kept = dict.fromkeys(places, k)
    return net, sliced(net, kept, second__in_channels=6, between__num_groups=3, between__num_channels=6), kept, image()


def geglu_case() -> tuple[nn.Module, nn.Module, Kept, Tensor]:
    net = double(GEGLU())
    combine(net.proj, 5, {2: -2.0})
    combine(net.proj, 13, {10: 1.0})
    k = without([5, 13], 16)
    kept = {("proj.weight", 0): k, ("proj.bias", 0): k, ("out.weight", 1): without(5, 8)}
    return net, sliced(net, kept, out__in_features=7), kept, image(channels=4, size=6)


def attention_case() -> tuple[nn.Module, nn.Module, Kept, Tensor]:
    net = double(Attention())
    combine(net.to_v, 1, {0: 0.5, 3: 1.0})
    combine(net.to_v, 6, {4: 1.0, 5: -1.0})
    k = without([1, 6], 8)
    kept = {("to_v.weight", 0): k, ("to_v.bias", 0): k, ("to_out.weight", 1): k}
    return net, sliced(net, kept, to_out__in_features=6), kept, image(channels=5, size=6).flatten(0, 1)


CASES = {
    "convolution": conv_case,
    "convolution without bias, after a ReLU": relu_case,
    "grouped convolution": grouped_case,
    "behind a norm": norm_case,
    "behind a GEGLU": geglu_case,
    "attention's values": attention_case,
}
