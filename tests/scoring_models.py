"""A small denoiser with its plan written by hand, and its scores straight from autograd."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from diffprune_fast.plan import Group, Member, Plan

HIDDEN = 12
MIDDLE = 8


class TinyDenoiser(nn.Module):
    """conv_in -> (conv1 + time -> norm -> conv2) as a residual -> conv_out; ``unused`` takes no part in forward."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, HIDDEN, 3, padding=1)
        self.conv1 = nn.Conv2d(HIDDEN, MIDDLE, 3, padding=1)
        self.time = nn.Linear(4, MIDDLE)
        self.norm = nn.GroupNorm(2, MIDDLE)
        self.conv2 = nn.Conv2d(MIDDLE, HIDDEN, 1)
        self.conv_out = nn.Conv2d(HIDDEN, channels, 1)
        self.unused = nn.Linear(2, 2)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        phase = timestep.to(sample)[:, None] / 100 * torch.arange(1, 5, device=sample.device)
        x = self.conv_in(sample)
        h = self.conv1(torch.tanh(x)) + self.time(torch.sin(phase))[:, :, None, None]
        return self.conv_out(x + self.conv2(torch.tanh(self.norm(h))))


def tiny(seed: int = 0, dtype: torch.dtype = torch.float64) -> TinyDenoiser:
    torch.manual_seed(seed)
    return TinyDenoiser().to(dtype)


def single(parameter: str, dim: int, n: int) -> Member:
    return Member(parameter, dim, np.arange(n).reshape(n, 1))


def tiny_plan(model: nn.Module, *, frozen_middle: int = 0) -> Plan:
    """``stream``: half as many units as hidden channels, two channels each. ``middle``: one unit per channel, but the
    first ``frozen_middle`` channels stay."""
    pairs = np.arange(HIDDEN).reshape(2, HIDDEN // 2).T
    stream = [("conv_in.weight", 0), ("conv_in.bias", 0), ("conv1.weight", 1), ("conv2.weight", 0)]
    stream += [("conv2.bias", 0), ("conv_out.weight", 1)]
    middle = [("conv1.weight", 0), ("conv1.bias", 0), ("time.weight", 0), ("time.bias", 0)]
    middle += [("norm.weight", 0), ("norm.bias", 0), ("conv2.weight", 1)]
    index = np.arange(frozen_middle, MIDDLE).reshape(-1, 1)
    return Plan(
        "TinyDenoiser",
        (
            Group("stream", len(pairs), tuple(Member(p, d, pairs) for p, d in stream)),
            Group("middle", len(index), tuple(Member(p, d, index) for p, d in middle)),
        ),
        (),
        {},
        {n: tuple(p.shape) for n, p in model.named_parameters()},
    )


def by_hand(plan: Plan, values: dict[str, Tensor], counts: object = None) -> np.ndarray:
    """``(n_units,)``: the sum of ``values`` (one per parameter element) over every channel of every unit.

    counts: called with a member, False leaves it out.
    """
    out = np.zeros(plan.n_units)
    for g, group in enumerate(plan.groups):
        for member in group.members:
            if counts is not None and not counts(member):  # type: ignore[operator]
                continue
            for unit, channels in enumerate(member.index):
                for channel in channels:
                    chosen = values[member.parameter].select(member.dim, int(channel))
                    out[plan.offsets[g] + unit] += float(chosen.sum())
    return out


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Every parameter's gradient, zero where there is none; nothing accumulates in the model."""
    names, parameters = zip(*model.named_parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found)}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters()}


def images(n: int, seed: int = 0, channels: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, channels, 6, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)
