"""Tensors that a forward makes of numbers: those that treat all channels alike don't keep any."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_exact
from torch import Tensor, nn

import diffprune_fast as dpf

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


class Between(nn.Module):
    """a -> ``between`` -> b."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.between = between
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


def diagonal(h: Tensor, kernel: Tensor) -> Tensor:
    """A matrix of kernels: ``kernel`` on the diagonal, zeros elsewhere."""
    weight = h.new_zeros(h.shape[1], h.shape[1], 3, 3)
    ids = torch.arange(h.shape[1], device=h.device)
    weight[ids, ids] = kernel
    return weight


def box(h: Tensor) -> Tensor:
    return torch.full((3, 3), 1 / 9, dtype=h.dtype, device=h.device)[None].expand(h.shape[1], -1, -1)


ALIKE: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros beside the channels": lambda h: torch.cat([h.new_zeros(h.shape[0], h.shape[1], 1, 8), h], dim=2),
    "ones added": lambda h: h + torch.ones(h.shape[1:], dtype=h.dtype, device=h.device),
    "an expanded row": lambda h: h + torch.linspace(0, 1, 8, dtype=h.dtype, device=h.device).expand(h.shape[1], 8, 8),
    "a view of zeros": lambda h: torch.where(h > 0, h, h.new_zeros(8, h.shape[1], 1).transpose(0, 1)),
    "one kernel for all": lambda h: F.conv2d(h, diagonal(h, box(h)), padding=1),
    "one kernel for all, upwards": lambda h: F.conv_transpose2d(h, diagonal(h, box(h)), stride=2),
}


def write(t: Tensor, part: Tensor) -> Tensor:
    part.copy_(torch.arange(part.numel(), device=t.device).reshape(part.shape))
    return t


def ramp(h: Tensor) -> Tensor:
    return torch.linspace(0, 1, h.shape[1], dtype=h.dtype, device=h.device)[None, :, None, None]


def shifted(h: Tensor) -> Tensor:
    """The diagonal's ids after one of them was changed."""
    weight = h.new_zeros(h.shape[1], h.shape[1], 1, 1)
    ids = torch.arange(h.shape[1], device=h.device)
    ids[:1] = 1
    weight[ids, ids] = 1
    return weight


def elsewhere(h: Tensor) -> Tensor:
    """Ones in the first column, not on the diagonal."""
    weight = h.new_zeros(h.shape[1], h.shape[1], 1, 1)
    ids = torch.arange(h.shape[1], device=h.device)
    weight[ids, torch.zeros_like(ids)] = 1
    return weight


NOT_ALIKE: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros that were written": lambda h: h + write(z := h.new_zeros(1, h.shape[1], 1, 1), z),
    "zeros whose view was written": lambda h: h + write(z := h.new_zeros(1, h.shape[1], 1, 1), z[0, :, 0]),
    "zeros of which a part was written": lambda h: h + write(z := h.new_zeros(2, h.shape[1], 1, 1), z.chunk(2)[0])[:1],
    "zeros that were added to": lambda h: h + h.new_zeros(1, h.shape[1], 1, 1).add_(ramp(h)),
    "zeros that took a result": lambda h: h + torch.mul(ramp(h), 2, out=h.new_zeros(1, h.shape[1], 1, 1)),
    "a view of what was written": lambda h: h + write((z := h.new_zeros(1, h.shape[1], 1, 1))[0], z),
    "a kernel that is not on the diagonal": lambda h: F.conv2d(h, elsewhere(h)),
    "a kernel at other ids": lambda h: F.conv2d(h, shifted(h)),
    "another kernel for each": lambda h: F.conv2d(h, diagonal(h, torch.rand(h.shape[1], 3, 3, device=h.device))),
    "a kernel that was overwritten": lambda h: F.conv2d(h, write(w := diagonal(h, box(h)), w[0])),
    "ones as a kernel": lambda h: F.conv2d(h, h.new_ones(h.shape[1], h.shape[1], 1, 1)),
    "a number that follows the width": lambda h: h * torch.full_like(h, h.shape[1]),
    "a new number that follows the width": lambda h: h * h.new_full((1, h.shape[1], 1, 1), h.shape[1]),
    "one number that follows the width": lambda h: h * torch.full((1, 1, 1, 1), h.shape[1], device=h.device),
    "a scalar that follows the width": lambda h: h * torch.tensor(float(h.shape[1]), device=h.device),
    "a scalar that is moved": lambda h: h * torch.tensor(float(h.shape[1])).to(h.device),
    "a buffer filled with the width": lambda h: h * h.new_empty(1, h.shape[1], 1, 1).fill_(h.shape[1]),
}


@pytest.mark.parametrize("name", ALIKE)
def test_constants_alike_in_all_channels_leave_them_free(name: str) -> None:
    model = Between(ALIKE[name])
    assert_exact(model, lambda m: m(X), example_inputs=(X[:1],))
    assert model.a.out_channels < 12


@pytest.mark.parametrize("name", NOT_ALIKE)
def test_constants_that_tell_channels_apart_keep_them(name: str) -> None:
    assert dpf.trace(Between(NOT_ALIKE[name]), (X[:1].float(),)).groups == ()


def each_alone(h: Tensor) -> Tensor:
    """Every channel as an image of its own through one kernel, as resamplers do it."""
    alone = F.conv2d(h.reshape(-1, 1, *h.shape[2:]), box(h)[:1, None], padding=1)
    return alone.reshape(h.shape)


def test_channels_in_the_batch_of_a_convolution_are_free() -> None:
    model = Between(each_alone)
    result = assert_exact(model, lambda m: m(X), example_inputs=(X[:1],))
    assert model.a.out_channels < 12
    kernel = 12 * 64 * 9
    assert result.before.macs == 64 * 9 * (3 * 12 + 12 * 3) + kernel
    assert result.after.macs * 12 == result.before.macs * model.a.out_channels


def test_rows_beside_the_channels_may_be_padded() -> None:
    model = nn.Sequential(nn.Linear(5, 12), nn.ConstantPad1d((0, 0, 1, 2), 0.0), nn.SiLU(), nn.Linear(12, 3))
    x = torch.randn(4, 5, dtype=torch.float64)
    assert_exact(model, lambda m: m(x), example_inputs=(x,))
    assert model[0].out_features < 12


def test_sequences_of_different_lengths_meet_in_their_channels() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(nn.utils.rnn.pad_sequence([self.a(x), self.b(x[:2])], batch_first=True))

    x = torch.randn(4, 5, dtype=torch.float64)
    result = assert_exact(Padded(), lambda m: m(x), example_inputs=(x,))
    assert {m.place for m in result.plan["a"].members} >= {"a.weight:0", "b.weight:0", "out.weight:1"}


def turned(h: Tensor, dim: int) -> Tensor:
    """Pairs along a dim are turned by an angle, as complex numbers."""
    pairs = torch.view_as_complex(h.movedim(dim, -1).unflatten(-1, (-1, 2)).contiguous())
    angle = torch.full((1,), 0.5, dtype=h.dtype, device=h.device)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2).movedim(-1, dim)


def test_complex_numbers_beside_the_channels_leave_them_free() -> None:
    model = Between(lambda h: turned(h, 3))
    assert_exact(model, lambda m: m(X), example_inputs=(X[:1],))
    assert model.a.out_channels < 12


def test_channels_that_are_halves_of_complex_numbers_stay() -> None:
    plan = dpf.trace(Between(lambda h: turned(h, 1)), (X[:1],))
    assert "half of a complex number" in plan.frozen["a.weight:0"]
