"""Weights that a module computes from its parameters whenever it runs: weight_norm, spectral_norm, parametrizations.

Of a weight ``g * v / |v|`` channels can be removed along both dims: where v loses columns, g takes the factor by which
the norms of v's rows shrink, and what stays is what it was. That needs g to be used for nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..module_tree import modules_of
from .walk import Walk

_PARAMETRIZED = "torch.nn.utils.parametrize.remove_parametrizations"


_HOOKS = {SpectralNorm: "torch.nn.utils.remove_spectral_norm", WeightNorm: "torch.nn.utils.remove_weight_norm"}


def note_gain(walk: Walk, g: Tensor, v: Tensor) -> bool:
    """Note that g can take what is left of the norms of v's rows; False where it can't."""
    gain, direction = walk.name_of(g), walk.name_of(v)
    if gain is None or direction is None or g.dim() == 0 or g.shape[0] != v.shape[0]:
        return False
    if walk.gains.setdefault(gain, direction) != direction:
        walk.read.add(gain)  # by the weight of another direction
        return False
    return True


def freeze_gains_read_elsewhere(walk: Walk) -> None:
    """A factor in such a gain would change more than the weight."""
    for gain in walk.gains.keys() & walk.read:
        for label_map in walk.channels.maps(walk.gains[gain])[1:]:
            walk.graph.freeze(label_map, f"changes the norm of a weight whose gain, {gain}, is read elsewhere")


def is_computed_weight(module: nn.Module, name: str) -> bool:
    """Whether an attribute holds what a hook computes anew before every forward."""
    return any(
        type(hook) in _HOOKS and getattr(hook, "name", None) == name for hook in module._forward_pre_hooks.values()
    )


def with_cures(model: nn.Module, frozen: dict[str, str]) -> dict[str, str]:
    """The reasons that come of a computed weight say what takes it away."""
    cures = list(_cures(model))
    if not cures:
        return frozen

    def cured(reason: str) -> str:
        return next((f"{reason}: call {cure} first" for place, cure in cures if place.search(reason)), reason)

    return {name: cured(reason) for name, reason in frozen.items()}


def _cures(model: nn.Module) -> Iterator[tuple[re.Pattern[str], str]]:
    """How reasons name what computes a weight, and the function that leaves a plain weight in its place."""
    for path, module in modules_of(model).items():
        if isinstance(module, ParametrizationList):
            yield re.compile(rf"\b{re.escape(path)}[. ]"), _PARAMETRIZED
        for hook in module._forward_pre_hooks.values():
            if type(hook) in _HOOKS:  # the hook's operations, not those of the module itself
                place = rf"\b{re.escape(path or 'model')} \((?!conv|linear|addmm|embedding)"
                yield re.compile(place), _HOOKS[type(hook)]
