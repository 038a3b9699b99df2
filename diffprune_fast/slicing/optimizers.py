"""An optimiser's state of sliced parameters: what follows the slicing, and what can't."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor, nn

from ..ops.slice_channels import Step
from ..pruned.held_tensors import tables
from .verify import SliceError

# State that gradients went into, and in which power: where a weight takes a factor, its gradient shrinks by the same.
_POWERS = {"exp_avg": -1, "exp_avg_sq": -2, "max_exp_avg_sq": -2, "momentum_buffer": -1}


def check_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, inplace: bool, sliced: Collection[str] = ()
) -> None:
    """The optimiser is of this model's own parameters, and its state of those in ``sliced`` (names) can be sliced.

    Raises SliceError.
    """
    if optimizer is None:
        return
    if not inplace:
        raise SliceError(
            "an optimizer can't be sliced with inplace=False, it holds the original's parameters: leave out one of the "
            "two, or make an optimizer for result.model"
        )
    kind = type(optimizer).__name__
    parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in parameters for p in model.parameters()):
        raise SliceError(
            f"the optimizer ({kind}) holds none of the parameters of {type(model).__name__}: make it of "
            "model.parameters(), or leave it out and make one afterwards"
        )
    for name, _, _, t in tables(model):
        if name not in sliced or t not in optimizer.state:
            continue
        for key, state in optimizer.state[t].items():
            if isinstance(state, Tensor) and state.numel() > 1 and state.shape != t.shape:
                raise SliceError(
                    f"{kind} keeps {key!r} of {name} in another shape than the parameter's, {tuple(state.shape)} for "
                    f"{tuple(t.shape)}, which can't be sliced: leave out optimizer= and make a new {kind} afterwards"
                )


def state_of(optimizer: torch.optim.Optimizer | None, name: str, parameter: Tensor) -> list[tuple[str, Tensor, int]]:
    """The optimiser's tensors of a parameter's shape: name, tensor, the power of a factor on the weight that it takes.

    Step counters and the like stay as they are, and so do the values of state whose meaning isn't known by its name.
    """
    if optimizer is None or parameter not in optimizer.state:
        return []
    state = {k: v for k, v in optimizer.state[parameter].items() if isinstance(v, Tensor)}
    return [(f"{name}'s {k}", v, _POWERS.get(k, 0)) for k, v in state.items() if v.shape == parameter.shape]


def forgetting(optimizer: torch.optim.Optimizer, old: Collection[nn.Parameter], model: nn.Module) -> list[Step]:
    """The calls that take the parameters which a model no longer has out of its optimiser."""
    staying = {id(p) for p in model.parameters()}
    gone = {id(p): p for p in old if id(p) not in staying}
    steps: list[Step] = [partial(optimizer.state.pop, p, None) for p in gone.values()]
    for group in optimizer.param_groups:
        left = [p for p in group["params"] if id(p) not in gone]
        steps.append(partial(group["params"].__setitem__, slice(None), left))
    return steps
