"""Recognising pruned models that a diffusers config describes as they are.

A UNet that was pruned evenly is the same class with smaller ``block_out_channels``. Then that config is all that is
needed to load it, with the class's own ``from_pretrained``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..architectures.configs import _RULES, _widths, build_on_meta, own_config, shapes_of
from ..architectures.inputs import calls_of, knows_inputs
from ..pruned.kept_columns import kept_columns
from ..pruned.record import is_settable

# Switches of a running module that no shape follows from.
_SWITCHES = frozenset({"training", "gradient_checkpointing", "use_slicing", "use_tiling"})


# Integers that outputs depend on even where every shape fits.
_SETTINGS = frozenset({"heads", "num_groups", "groups", "kernel_size", "stride", "padding", "dilation"})


def changed_attributes(model: nn.Module, fresh: nn.Module) -> dict[str, Any]:
    """Attributes of ``model``'s modules that slicing may have set and that ``fresh`` has with another value.

    Keys are ``"down_blocks.0.attentions.0.heads"``; both models have the same modules.
    """
    changed = {}
    other = dict(fresh.named_modules())
    for path, module in model.named_modules():
        if path not in other:
            continue
        theirs = vars(other[path])
        for name, value in vars(module).items():
            if name.startswith("_") or name in _SWITCHES or name not in theirs or not is_settable(value):
                continue
            if theirs[name] != value:
                changed[f"{path}.{name}" if path else name] = value
    return changed


def plain_config(model: nn.Module) -> dict[str, Any] | None:
    """The config that builds ``model`` as it is, or None where there is none (or no rule to find it).

    The model built from it has the same shapes and settings (heads, norm groups, scales), and with the same weights it
    gave the same outputs to a small random input; where no inputs are known for the class, it has the same attributes
    and tables throughout.
    """
    if not hasattr(model, "config") or not hasattr(type(model), "from_config") or kept_columns(model):
        return None
    config = own_config(model)
    shapes = shapes_of(model)
    rule = _RULES.get(type(model).__name__, lambda *_: ())
    for updates in ({}, *rule(model, config, shapes)):
        try:
            with warnings.catch_warnings():  # not every combination of widths is one that the class can take
                warnings.simplefilter("ignore")
                fresh = build_on_meta(type(model), {**config, **updates})
        except Exception:  # whatever a class makes of widths that it can't take
            continue
        if shapes_of(fresh) != shapes or not _same_settings(model, fresh):
            continue
        if _same_outputs(model, fresh) if knows_inputs(model) else _same_parts(model, fresh):
            return {**config, **updates}
    return None


def is_own_config(model: nn.Module) -> bool:
    """Whether the config that ``model`` carries builds it as it is."""
    found = plain_config(model)
    return found is not None and found == own_config(model)


def _same_settings(model: nn.Module, fresh: nn.Module) -> bool:
    theirs = dict(fresh.named_modules())
    for path, module in model.named_modules():
        other = theirs.get(path)
        if other is None or type(other) is not type(module):
            return False
        processor = getattr(module, "processor", None)
        if type(getattr(other, "processor", None)) is not type(processor):
            return False
        if settings_of(module) != settings_of(other):
            return False
    return True


def settings_of(module: nn.Module) -> dict[str, Any]:
    """What decides about outputs beside shapes; widths that a class notes down and never reads again may be stale."""
    return {
        name: value
        for name, value in vars(module).items()
        if name in _SETTINGS
        or (isinstance(value, (float, bool)) and not name.startswith("_") and name not in _SWITCHES)
    }


def _same_outputs(model: nn.Module, fresh: nn.Module) -> bool:
    """Whether both give the same outputs with ``model``'s weights; neither is changed, hooks don't run."""
    shared = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(t): t for t in shared}).eval()
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    fresh.load_state_dict(model.state_dict(), strict=True, assign=True)
    if any(t.is_meta for t in [*fresh.parameters(), *fresh.buffers()]):
        return False
    factor = 2 ** (len(_widths(shapes_of(model))) or len(_widths(shapes_of(model), "encoder.")))
    generator = torch.Generator().manual_seed(0)

    def real(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: real(v) for k, v in x.items()}
        if not isinstance(x, torch.Tensor):
            return x
        if x.is_meta:
            shape = [*x.shape[:2], *(min(n, factor) for n in x.shape[2:])] if x.ndim == 4 else x.shape
            x = torch.randn(shape, generator=generator).to(shared[0].dtype)
        return x.to(shared[0].device)

    for method, args, kwargs in calls_of(fresh, None):
        args, kwargs = tuple(real(a) for a in args), real(kwargs)
        with torch.no_grad():
            ours, theirs = (_tensors(getattr(m, method)(*args, **kwargs)) for m in (twin, fresh.eval()))
        slack = 1e-5 if shared[0].dtype in (torch.float32, torch.float64) else 1e-3
        if not all((a - b).abs().max() <= slack * a.abs().max() for a, b in zip(ours, theirs, strict=True)):
            return False
    return True


def _same_parts(model: nn.Module, fresh: nn.Module) -> bool:
    """Whether nothing that a forward could read differs but the weights, where no inputs are known to try it with."""
    if changed_attributes(model, fresh):
        return False
    named = dict(fresh.named_buffers())
    unsaved = {name: b for name, b in model.named_buffers() if name not in model.state_dict()}
    if any(named[name].is_meta for name in unsaved):
        named = dict(type(model).from_config(fresh.config).named_buffers())  # type: ignore[attr-defined]
    return all(torch.allclose(b.cpu().float(), named[name].float(), atol=1e-5) for name, b in unsaved.items())


def _tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [t for value in output.values() for t in _tensors(value)]
    return _tensors(getattr(output, "parameters", {}))  # an autoencoder's distribution over latents
