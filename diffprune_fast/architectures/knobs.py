"""The widths that a config can express: which keys of it are turned, in which steps, and what turns with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..choices import Units

Values = tuple[int, ...]


@dataclass(frozen=True)
class Knobs:
    """values: per knob the widths that it can have, falling, the present one first. apart: pairs of knobs that must
    differ. updates: what of the config changes at some values. units: what goes of attentions then."""

    values: tuple[Values, ...]
    updates: Callable[[Values], dict[str, Any]]
    units: Units
    apart: tuple[tuple[int, int], ...] = ()


def knobs_of(model: Any, round_to: int = 1, most: float = 0.9) -> Knobs:
    """The knobs of a model's class.

    round_to: widths become multiples of so many channels where that leaves a choice. most: the share of a width that
    may go at most.

    Raises ValueError for a class whose config has none that are known.
    """
    make = _KNOBS.get(type(model).__name__)
    if make is None:
        raise ValueError(
            f"layout='config' knows {', '.join(sorted(_KNOBS))}, not {type(model).__name__}: give like= a config"
        )
    return make(model.config, round_to, most)


def _steps(whole: int, step: int, round_to: int, most: float) -> Values:
    """Multiples below ``whole`` of ``step``, and of ``round_to`` where at least three are left."""
    for by in (math.lcm(step, round_to), step):
        found = range(whole - by if whole % by == 0 else whole // by * by, 0, -by)
        values = [v for v in found if v >= (1 - most) * whole]
        if len(values) > 2:
            break
    return (whole, *values)


def _levels(widths: Sequence[int], steps: Sequence[int], round_to: int, most: float, units: Units) -> Knobs:
    """A knob for each run of equal levels: between them no shortcut has a convolution, so they stay equal."""
    runs: list[list[int]] = []
    for i, width in enumerate(widths):
        if i and widths[i - 1] == width:
            runs[-1].append(i)
        else:
            runs.append([i])
    values = tuple(_steps(widths[run[0]], math.lcm(*(steps[i] for i in run)), round_to, most) for run in runs)

    def updates(chosen: Values) -> dict[str, Any]:
        return {"block_out_channels": tuple(chosen[k] for k, run in enumerate(runs) for _ in run)}

    return Knobs(values, updates, units, tuple((k, k + 1) for k in range(len(runs) - 1)))


def _unet2d(c: Any, round_to: int, most: float) -> Knobs:
    widths, head = c.block_out_channels, c.attention_head_dim
    last = len(widths) - 1  # the middle is as wide as the last level, and attends
    types = list(zip(c.down_block_types, reversed(c.up_block_types)))
    attends = [i == last or any("Attn" in name for name in pair) for i, pair in enumerate(types)]
    steps = [math.lcm(c.norm_num_groups, head or 1) if here else c.norm_num_groups for here in attends]
    return _levels(widths, steps, round_to, most, "dims" if head is None else "heads")


def _unet2d_condition(c: Any, round_to: int, most: float) -> Knobs:
    widths = c.block_out_channels
    heads = c.num_attention_heads or c.attention_head_dim
    heads = [heads] * len(widths) if isinstance(heads, int) else list(heads)
    steps = [math.lcm(c.norm_num_groups or 1, h) for h in heads]
    return _levels(widths, steps, round_to, most, "dims")


def _autoencoder_kl(c: Any, round_to: int, most: float) -> Knobs:
    widths = c.block_out_channels
    return _levels(widths, [c.norm_num_groups] * len(widths), round_to, most, "dims")


def _head_dims(*follow: str) -> Callable[[Any, int, float], Knobs]:
    """Transformers whose heads get fewer dims; ``follow``: keys that hold the whole width as well."""

    def make(c: Any, round_to: int, most: float) -> Knobs:
        heads = c.num_attention_heads
        # A table of positions has sines and cosines of two coordinates; size conditions are thirds of the width.
        by = 12 if c.get("use_additional_conditions") else 4
        values = _steps(c.attention_head_dim, by // math.gcd(by, heads), 1, most)

        def updates(chosen: Values) -> dict[str, Any]:
            return {"attention_head_dim": chosen[0], **dict.fromkeys(follow, heads * chosen[0])}

        return Knobs((values,), updates, "dims")

    return make


def _heads(c: Any, round_to: int, most: float) -> Knobs:
    """Rotary embeddings fix the dims of a head: whole heads go."""
    values = tuple(v for v in _steps(c.num_attention_heads, 1, 1, most) if v > 1)
    return Knobs((values,), lambda chosen: {"num_attention_heads": chosen[0]}, "heads")


_KNOBS: dict[str, Callable[[Any, int, float], Knobs]] = {
    "UNet2DModel": _unet2d,
    "UNet2DConditionModel": _unet2d_condition,
    "AutoencoderKL": _autoencoder_kl,
    "DiTTransformer2DModel": _head_dims(),
    "PixArtTransformer2DModel": _head_dims("cross_attention_dim"),
    "SD3Transformer2DModel": _head_dims("caption_projection_dim"),
    "FluxTransformer2DModel": _heads,
}
