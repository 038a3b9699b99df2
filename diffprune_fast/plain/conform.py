"""What a config means beside widths: tables that a class makes of them, and what its modules note down.

A UNet's time embedding begins with as many sinusoids as its first level is wide, a patch embedding has a table of
positions of its width. A model of a smaller config makes them anew, with other frequencies: they are not some of the
channels that were there. So a sliced model gets them as its class would make them, and what reads the sinusoids is
solved for them.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.configs import shapes_of
from ..architectures.position_tables import table_of
from ..checkpoint.loading import apply_shapes
from ..checkpoint.plain_config import changed_attributes, settings_of
from ..ops.slice_channels import Step
from ..plan.keep_sets import Sliced
from ..pruned.kept_columns import detach
from ..selection.budgets import BudgetError
from .counts import Place
from .sinusoids import readers, solve
from .target import Target


def replaced_places(model: nn.Module, target: Target) -> set[Place]:
    """The places whose size :func:`conform` sees to: the inputs of what reads sinusoids."""
    return {(f"{name}.linear_1.weight", 1) for name, _, _ in readers(model, target.fresh)}


def check_settings(model: nn.Module, sliced: Sliced, target: Target) -> None:
    """Raises BudgetError where the sliced model would differ from the target's in more than its weights."""
    empty = copy.deepcopy(model, {id(t): _on_meta(t) for t in [*model.parameters(), *model.buffers()]})
    apply_shapes(empty, sliced.shapes, sliced.attributes)
    theirs = dict(target.fresh.named_modules())
    for path, module in empty.named_modules():
        mine, wanted = settings_of(module), settings_of(theirs[path])
        for name in sorted(mine.keys() & wanted.keys()):
            if mine[name] != wanted[name]:
                raise BudgetError(
                    f"like={target} can't be reached: {path}.{name} would be {wanted[name]}, and pruning leaves it at "
                    f"{mine[name]}"
                )


def conform(model: nn.Module, target: Target, steps: int = 1000) -> int:
    """Make of a sliced model of the target's shapes one of the target's config. In place.

    steps: timesteps that the sinusoids are told. Returns how many parameters fewer it has by that.
    """
    fewer = 0
    for name, old, new in list(readers(model, target.fresh)):
        layer: Any = model.get_submodule(f"{name}.linear_1")
        fewer += layer.weight.numel()
        solve(layer, old, new, steps)
        fewer -= layer.weight.numel()
    theirs = dict(target.fresh.named_modules())
    for path, module in model.named_modules():
        rule = table_of(module)
        if rule is not None:
            held, other = getattr(module, rule.buffer), getattr(theirs[path], rule.buffer)
            table = rule.made(module, rule.held(theirs[path]), other.shape[-1], held.device)
            rule.hold(module, rule.held(theirs[path]), table.to(held.dtype))
            detach(module)
    for path, value in changed_attributes(theirs[""], model).items():
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, value)
    model.register_to_config(**target.updates)  # type: ignore[operator]
    if shapes_of(model) != shapes_of(target.fresh):
        raise AssertionError("a sliced model has other shapes than its target")
    return fewer


def conforming_steps(model: nn.Module, conformed: nn.Module, sliced: Sliced, target: Target) -> list[Step]:
    """The calls after which ``model``, sliced, has what :func:`conform` gave another copy of it, parameters aside.

    Gradients of parameters whose shape the slicing doesn't decide go.
    """
    theirs = dict(conformed.named_modules())
    steps: list[Step] = []
    for path, module in model.named_modules():
        rule = table_of(module)
        if rule is not None:
            table = getattr(theirs[path], rule.buffer)
            steps += [partial(rule.hold, module, rule.held(theirs[path]), table), partial(detach, module)]
    for path, value in changed_attributes(conformed, model).items():
        owner, _, name = path.rpartition(".")
        steps.append(partial(setattr, model.get_submodule(owner), name, value))
    for name, p in conformed.named_parameters():
        if tuple(p.shape) != tuple(sliced.shapes.get(name, p.shape)):
            steps.append(partial(setattr, model.get_parameter(name), "grad", None))
    register: Any = model.register_to_config
    return [*steps, partial(register, **target.updates)]


def _on_meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
