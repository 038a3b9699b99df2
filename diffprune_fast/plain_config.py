"""Recognising pruned models that a diffusers config describes as they are.

A UNet that was pruned evenly is the same class with smaller ``block_out_channels``. Then that config is all that is
needed to load it, with the class's own ``from_pretrained``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# A processor of this kind leaves the softmax scale to scaled_dot_product_attention, so that ``Attention.scale`` is
# never read; slicing has folded the correction into the weights.
_SCALE_UNREAD = ("AttnProcessor2_0", "FusedAttnProcessor2_0", "AttnAddedKVProcessor2_0")
# Switches of a running module that no shape follows from.
_SWITCHES = frozenset({"training", "gradient_checkpointing", "use_slicing", "use_tiling"})


def build_on_meta(cls: type, config: dict[str, Any]) -> nn.Module:
    """An instance of a diffusers class without memory for its weights."""
    with torch.device("meta"):
        return cls.from_config(config)  # type: ignore[attr-defined]


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every parameter and buffer, tied ones under each of their names."""
    named = itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return {name: tuple(t.shape) for name, t in named}


def changed_attributes(model: nn.Module, fresh: nn.Module) -> dict[str, Any]:
    """Integer and tuple attributes of ``model``'s modules that ``fresh`` has with another value.

    Keys are ``"down_blocks.0.attentions.0.heads"``; both models have the same modules.
    """
    changed = {}
    other = dict(fresh.named_modules())
    for path, module in model.named_modules():
        if path not in other:
            continue
        theirs = vars(other[path])
        for name, value in vars(module).items():
            if name.startswith("_") or name in _SWITCHES or name not in theirs or not is_count(value):
                continue
            if theirs[name] != value:
                changed[f"{path}.{name}" if path else name] = value
    return changed


def is_count(value: Any) -> bool:
    """Whether ``value`` is what a module attribute that follows a number of channels may be."""
    if isinstance(value, tuple):
        return all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    return isinstance(value, int) and not isinstance(value, bool)


def own_config(model: Any) -> dict[str, Any]:
    """The arguments that a diffusers model was built with, without what diffusers notes beside them."""
    return {k: v for k, v in dict(model.config).items() if not k.startswith("_")}


def plain_config(model: nn.Module) -> dict[str, Any] | None:
    """The config that builds ``model`` as it is, or None where there is none (or no rule to find it).

    The model built from it has the same shapes and the same integers, tuples and numbers in every module, so that the
    same weights give the same outputs.
    """
    rule = _RULES.get(type(model).__name__)
    if rule is None or not hasattr(model, "config"):
        return None
    config = own_config(model)
    shapes = shapes_of(model)
    for updates in rule(model, config, shapes):
        try:
            fresh = build_on_meta(type(model), {**config, **updates})
        except (ValueError, TypeError, ZeroDivisionError, RuntimeError, NotImplementedError):
            continue  # not every combination of widths is one that the class accepts
        if shapes_of(fresh) == shapes and _same_function(model, fresh):
            return {**config, **updates}
    return None


def _same_function(model: nn.Module, fresh: nn.Module) -> bool:
    theirs = dict(fresh.named_modules())
    for path, module in model.named_modules():
        other = theirs.get(path)
        if other is None or type(other) is not type(module):
            return False
        processor = getattr(module, "processor", None)
        if type(getattr(other, "processor", None)) is not type(processor):
            return False
        unread = {"scale"} if type(processor).__name__ in _SCALE_UNREAD else set()
        if _numbers(module, unread) != _numbers(other, unread):
            return False
    return True


def _numbers(module: nn.Module, unread: set[str]) -> dict[str, Any]:
    skip = _SWITCHES | unread
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in skip and (is_count(value) or isinstance(value, (float, bool)))
    }


def _widths(shapes: dict[str, tuple[int, ...]], prefix: str = "") -> tuple[int, ...]:
    """The output channels of each down block: of its first ResNet's second convolution."""
    widths: list[int] = []
    for i in itertools.count():
        shape = shapes.get(f"{prefix}down_blocks.{i}.resnets.0.conv2.weight")
        if shape is None:
            return tuple(widths)
        widths.append(shape[0])
    raise AssertionError  # itertools.count never ends


def _head_sizes(model: nn.Module) -> list[int]:
    """The head sizes of the attentions, each once."""
    layers: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "to_q", None), nn.Linear)]
    return sorted({m.to_q.weight.shape[0] // m.heads for m in layers if getattr(m, "heads", 0)})


def _unet2d(model: nn.Module, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, Any]]:
    for size in dict.fromkeys([config.get("attention_head_dim"), *_head_sizes(model)]):
        yield {"block_out_channels": _widths(shapes), "attention_head_dim": size}


def _unet2d_condition(
    model: nn.Module, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> Iterator[dict[str, Any]]:
    widths = _widths(shapes)
    yield {"block_out_channels": widths}
    time = shapes.get("time_embedding.linear_1.weight", (0,))[0]
    yield {"block_out_channels": widths, "time_embedding_dim": time}


def _autoencoder_kl(
    model: nn.Module, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> Iterator[dict[str, Any]]:
    yield {"block_out_channels": _widths(shapes, "encoder.")}


_RULES = {"UNet2DModel": _unet2d, "UNet2DConditionModel": _unet2d_condition, "AutoencoderKL": _autoencoder_kl}
