"""Distillation of sensitivity: how strongly the answers move when the noisy images do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..objective.conditioning import signature_of
from ..objective.loss import first_tensor
from .distillation import Call, Distillation


@dataclass(frozen=True)
class SecondOrder(Distillation):
    """Beside the distance of the answers, that of their sensitivities: (||J_S v||^2 / ||J_T v||^2 - 1)^2; a
    :data:`StepLoss`.

    J is the answer's derivative by the noisy images, v a random unit vector for each sample, and J v the difference of
    two answers, divided by the way between them. Relative, because ||J v||^2 goes from 1 to 2,300 with the timestep in
    the digits model: by the plain difference 19 steps undid a compensated one (docs/study.md). weight: of the squared
    difference. length: that way, relative to the images' norm; half-precision answers need a longer one.

    Source: 2ndMatch, arXiv 2506.05398; by differences, as fused attention has no second derivatives.
    """

    weight: float = 0.1
    length: float = 0.01

    def of_call(self, model: nn.Module, call: Call) -> Tensor:
        theirs = self.answer(call)
        moved, way = self._moved(model, call)
        ours = _energy(first_tensor(model(*moved.args, **moved.kwargs)), call.answer, way)
        true = _energy(self.answer(moved), theirs, way)
        return self.distance(call.answer, theirs) + self.weight * (ours / true.to(ours.device) - 1).square().mean()

    def _moved(self, model: nn.Module, call: Call) -> tuple[Call, Tensor]:
        """The same call with its images moved along v; and how far, ``(batch,)``."""
        name = signature_of(model).sample
        images = call.kwargs[name] if name in call.kwargs else call.args[0]
        v = torch.randn(images.shape).to(images.device, images.dtype).flatten(1)
        length = self.length if self.autocast is None else 10 * self.length
        way = length * images.detach().flatten(1).norm(dim=1)
        other = images + (v / v.norm(dim=1, keepdim=True) * way[:, None]).view_as(images)
        args: tuple[Any, ...] = call.args if name in call.kwargs else (other, *call.args[1:])
        kwargs = {**call.kwargs, name: other} if name in call.kwargs else call.kwargs
        return Call(args, kwargs, call.answer), way


def _energy(moved: Tensor, still: Tensor, way: Tensor) -> Tensor:
    """``||J v||^2`` of every sample."""
    wide = torch.float64 if still.dtype == torch.float64 else torch.float32
    change = (moved.to(wide) - still.to(wide)).flatten(1).norm(dim=1)
    return (change / way.to(still.device, wide)).square()
