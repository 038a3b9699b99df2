"""One forward of the pruned model, in which every layer that lost inputs gets its new weights just before it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..objective.ranks import rank_and_count, reduced
from .calibration import Calibration
from .consumers import Consumer
from .estimates import Form
from .least_squares import Problem, solve
from .patches import NORMS, Patches, matrix_of, positions_of, values_at, weight_of
from .record import Target, first_input

# The first version whose matrix products give single precision from operands in half.
BMM_OUT_DTYPE = (2, 8)


@dataclass
class Solver:
    """Solves layers one after the other, in the order in which the pruned model calls them.

    forms: how each layer is solved. solved: the layers that have new weights; alone: those that keep their own, with
    the reason.
    """

    pruned: nn.Module
    dense: nn.Module
    targets: dict[str, Target]
    forms: Mapping[str, Form]
    ridge: float
    tick: Callable[[], None]
    solved: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    alone: dict[str, str] = field(default_factory=dict)

    def run(self, layers: Sequence[Consumer], calibration: Calibration) -> None:
        """The forward. Its new weights stand in the model's place of them until the stand-ins go."""
        self._drop_unseen(layers)
        with self._before_each(layers):
            calibration.run(self.pruned)
        for layer in layers:
            if layer.name not in self.solved:
                self.alone.setdefault(layer.name, "not called")

    def _drop_unseen(self, layers: Sequence[Consumer]) -> None:
        """Leave alone what the dense model did not call on every rank, as ranks add up the sums of what they solve."""
        seen = torch.tensor([layer.name in self.targets for layer in layers], dtype=torch.int64)
        everywhere = summed(seen.to(next(self.pruned.parameters()).device)) == rank_and_count()[1]
        for layer, known in zip(layers, everywhere.tolist(), strict=True):
            if not known:
                self.targets.pop(layer.name, None)
                self.alone[layer.name] = "not called"

    @contextmanager
    def _before_each(self, layers: Sequence[Consumer]) -> Iterator[None]:
        modules = dict(self.pruned.named_modules())
        handles: list[Any] = []
        try:
            for layer in layers:
                hook = modules[layer.name].register_forward_pre_hook(self._hook(layer), with_kwargs=True)
                handles.append(hook)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, layer: Consumer) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # A layer that is called again runs with what its first call gave it.
            if layer.name in self.solved or layer.name in self.alone:
                return
            x = first_input(args, kwargs)
            with torch.autocast(x.device.type, enabled=False):
                self._solve(layer, module, x)
            self.tick()

        return look

    def _solve(self, layer: Consumer, module: Any, x: Tensor) -> None:
        target = self.targets.pop(layer.name)
        weight, bias = module.weight, None
        reason = _unsolvable(module, x, target)
        if reason is None:
            try:
                if isinstance(module, NORMS):
                    weight, bias = self._refitted(module, x, target)
                elif target.of_inputs:
                    weight, bias = self._mixed(layer, module, x, target)
                else:
                    weight, bias = self._regressed(layer, module, x, target)
            except ArithmeticError as error:
                reason = str(error)
            reason = _agreed(reason, x.device)
        if reason is not None:
            self.alone[layer.name] = reason
            return
        # The layer has stand-ins now; what is put here goes when they go.
        module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            module._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
        self.solved[layer.name] = (weight, bias)

    def _regressed(self, layer: Consumer, module: Any, x: Tensor, target: Target) -> tuple[Tensor, Tensor | None]:
        dtype = _precision(module.weight)
        patches = Patches(module, x.detach(), target.rows, dtype)
        bias = None if module.bias is None else module.bias.detach().to(dtype)
        problem = Problem(
            patches,
            target.values,
            matrix_of(module.weight, patches.groups, dtype),
            bias,
            bias is not None,
            self.ridge,
            summed,
            _low_precision(module.weight),
        )
        matrix, bias = solve(problem, gradients=self.forms[layer.name] == "gradients")
        return weight_of(matrix, module.weight.detach()), _like(bias, module.bias)

    def _refitted(self, module: Any, x: Tensor, target: Target) -> tuple[Tensor, Tensor | None]:
        """A norm's weight and bias: the line through its normalised inputs and the dense norm's outputs, by channel."""
        dtype = _precision(module.weight)
        x = x.detach().to(dtype)
        if isinstance(module, nn.GroupNorm):
            normalised = F.group_norm(x, module.num_groups, eps=module.eps)
        else:
            normalised = F.layer_norm(x, module.normalized_shape, eps=module.eps)
        u = values_at(module, normalised, target.rows)
        r = target.values.to(u.device, dtype) - u * module.weight.detach().to(dtype) - module.bias.detach().to(dtype)
        n = summed(torch.tensor([len(u)], device=u.device))
        mean_u, mean_r = summed(u.sum(0)) / n, summed(r.sum(0)) / n
        u, r = u - mean_u, r - mean_r
        spread, cross = summed(u.square().sum(0)) / n, summed((u * r).sum(0)) / n
        change = cross / (spread * (1 + self.ridge)).clamp_min(torch.finfo(dtype).tiny)
        weight = module.weight.detach() + change.to(module.weight.dtype)
        return weight, _like(module.bias.detach().to(dtype) + mean_r - change * mean_u, module.bias)

    def _mixed(self, layer: Consumer, module: Any, x: Tensor, target: Target) -> tuple[Tensor, Tensor | None]:
        """The dense layer's weight on its inputs as combinations of those that are left, one for all kernel places."""
        dtype, low, movable = _precision(module.weight), _low_precision(module.weight), module.bias is not None
        dense: Any = self.dense.get_submodule(layer.name)
        was = _of_dense(layer, dense.weight, module.weight, dtype)
        rows = torch.arange(len(target.rows), device=x.device)
        patches = Patches(nn.Identity(), values_at(module, x.detach(), target.rows), rows, dtype)
        inputs = layer.inputs.to(was.device)
        selection = torch.zeros(1, len(inputs), was.shape[1], dtype=dtype, device=was.device)
        selection[0, torch.arange(len(inputs), device=was.device), inputs] = 1
        nothing = torch.zeros(was.shape[1], dtype=dtype, device=was.device) if movable else None
        problem = Problem(patches, target.values, selection, nothing, movable, self.ridge, summed, low)
        mixing, rest = solve(problem)
        weight = torch.empty_like(module.weight.detach()).copy_(torch.einsum("oc...,kc->ok...", was, mixing[0]))
        if rest is None:
            return weight, None
        bias = _of_dense(layer, dense.bias, module.weight, dtype) + was.flatten(2).sum(2) @ rest
        return weight, _like(bias, module.bias)


def _of_dense(layer: Consumer, values: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The dense layer's weight or bias for the outputs that are left, as slicing scaled it."""
    values = values.detach().to(like.device, dtype)
    values = values if layer.outputs is None else values.index_select(0, layer.outputs.to(like.device))
    if layer.factor is None:
        return values
    return values * layer.factor.to(like.device, dtype).view(-1, *[1] * (values.ndim - 1))


def _unsolvable(module: Any, x: Tensor, target: Target) -> str | None:
    """Why a layer can't be solved from what was recorded of it: all ranks say so, or none."""
    if target.of_inputs:
        sample = x.ndim == len(module.kernel_size) + 1
        shape = (1, *x.shape[1:]) if sample else (x.shape[0], *x.shape[2:])
    else:
        shape = positions_of(module, x)
    reason, values = None, target.values
    if tuple(shape) != target.shape:
        reason = f"its input has other places, {tuple(shape)}, than in the dense model, {target.shape}"
    elif rank_and_count()[1] == 1 and len(values) == 0:
        reason = "no rows"
    reason = _agreed(reason, x.device)
    constant = len(values) == 0 or bool((values.amax(0) == values.amin(0)).all())
    if reason is None and int(summed(torch.tensor([int(constant)], device=x.device))) == rank_and_count()[1]:
        return "constant targets"
    return reason


def _agreed(reason: str | None, device: torch.device) -> str | None:
    """A reason on every rank where there is one on any: a rank alone would leave the others waiting for its sums."""
    if not bool(summed(torch.tensor([int(reason is not None)], device=device))):
        return None
    return reason or "it can't be solved on another rank"


def summed(values: Tensor) -> Tensor:
    """``values``, added up over all ranks in place."""
    return reduced(values)


def _precision(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _low_precision(weight: Tensor) -> bool:
    """Operands in bfloat16 with sums in float32: on devices that are some ten times faster at it; the result is the
    same (.0471 both, a UNet of 1.6M parameters)."""
    version = tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2])
    return weight.device.type == "cuda" and weight.dtype != torch.float64 and version >= BMM_OUT_DTYPE


def _like(values: Tensor | None, bias: Tensor | None) -> Tensor | None:
    return None if values is None or bias is None else torch.empty_like(bias.detach()).copy_(values)
