"""Training towards another model's answers: the teacher is called with exactly what the model was called with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.dense import model_in
from ..objective.conditioning import read_batch
from ..objective.isolation import unwrapped
from ..objective.loss import Objective, dtype_of, first_tensor, reconstructed
from ..objective.nested import map_tensors

# What a step minimises: (model, batch, t, noise) -> scalar. The objective's own loss is one, distillation another.
StepLoss = Callable[[nn.Module, Any, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Call:
    """One call of a model's forward, and the tensor that it answered with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    answer: Tensor


@dataclass(frozen=True)
class Distillation:
    """Mean squared distance of the model's answers to the teacher's, at the same noisy inputs; a :data:`StepLoss`.

    share: of the distance; the rest is the objective's own loss. autocast: dtype of the teacher's forward, or None.
    """

    teacher: nn.Module
    objective: Objective
    share: float = 1.0
    autocast: torch.dtype | None = None

    def __call__(self, model: nn.Module, batch: Any, t: Tensor, noise: Tensor) -> Tensor:
        """The loss of one step. Raises ValueError for a teacher that can't be asked what the model was asked."""
        if self.objective.kind == "reconstruction":
            return self._of_autoencoder(model, batch, t, noise)
        with recorded(model) as calls:
            own = self.objective.loss(model, batch, t, noise)
        if not calls:
            raise ValueError(
                f"loss_fn never called {type(model).__name__} itself, so there is no answer to compare with the "
                "teacher's: let it call model(...), or compute the distance to the teacher in loss_fn"
            )
        return self._mixed(torch.stack([self.of_call(model, call) for call in calls]).mean(), own)

    def of_call(self, model: nn.Module, call: Call) -> Tensor:
        """The loss of one of the model's calls."""
        return self.distance(call.answer, self.answer(call))

    @staticmethod
    def distance(ours: Tensor, theirs: Tensor) -> Tensor:
        """Mean squared distance. Raises ValueError where the shapes differ."""
        return _distance(ours, theirs)

    def answer(self, call: Call) -> Tensor:
        """What the teacher answers to the same call, on its own device and in its own precision."""
        device, dtype = _device_of(self.teacher), dtype_of(self.teacher)

        def fitting(x: Tensor) -> Tensor:
            return x.detach().to(device, dtype if x.is_floating_point() else x.dtype)

        args, kwargs = map_tensors(call.args, fitting), map_tensors(call.kwargs, fitting)
        with torch.no_grad(), torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            try:
                answer = self.teacher(*args, **kwargs)
            except (TypeError, RuntimeError) as error:
                raise ValueError(
                    f"the teacher, a {type(self.teacher).__name__}, can't be called as the model is: {error}"
                ) from error
        return first_tensor(answer)

    def _of_autoencoder(self, model: nn.Module, batch: Any, t: Tensor, noise: Tensor) -> Tensor:
        images = read_batch(model, batch)[0]
        ours = reconstructed(model, images)[0]
        device = _device_of(self.teacher)
        with torch.no_grad(), torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            theirs = reconstructed(self.teacher, images.to(device))[0]
        own = self.objective.loss(model, batch, t, noise) if self.share < 1 else ours.new_zeros(())
        return self._mixed(_distance(ours, theirs), own)

    def _mixed(self, distance: Tensor, own: Tensor) -> Tensor:
        return distance if self.share == 1 else self.share * distance + (1 - self.share) * own


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Call]]:
    """Every call of ``model`` while this lasts, with its answer."""
    calls: list[Call] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(Call(args, kwargs, first_tensor(output)))

    handle = model.register_forward_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def find_teacher(teacher: Any, model: nn.Module) -> nn.Module:
    """The teacher as a module: itself, or loaded from a folder onto ``model``'s device.

    Raises ValueError for a teacher that shares weights with ``model`` (it would be trained too) and for a folder
    without a model, TypeError for anything else.
    """
    if isinstance(teacher, (str, os.PathLike)):
        return model_in(Path(teacher)).to(_device_of(model)).eval()
    if not isinstance(teacher, nn.Module):
        raise TypeError(
            f"teacher is a {type(teacher).__name__}: give a module (of a pipeline the component, such as pipe.unet) "
            "or the folder of one"
        )
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if any(id(p) in trained for p in unwrapped(teacher).parameters()):
        raise ValueError(
            "the teacher shares weights with the model that is trained: keep the dense model apart with "
            "score_and_prune(…, inplace=False), or give the folder that it was loaded from"
        )
    return teacher


def _distance(ours: Tensor, theirs: Tensor) -> Tensor:
    if ours.shape != theirs.shape:
        raise ValueError(
            f"the teacher answers {tuple(theirs.shape)} where the model answers {tuple(ours.shape)}: it has to be the "
            "model that was pruned, or one of the same outputs"
        )
    wide = torch.float64 if ours.dtype == torch.float64 else torch.float32
    return (ours.to(wide) - theirs.to(ours.device, wide)).square().mean()


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
