"""The pictures: sample grids, the loss curve with its threshold, kept channels per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..plan.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..scoring.scores import LossCurve


INK, ACCENT, PALE, MUTED = "#1f2933", "#2563eb", "#cfdaee", "#6b7785"
# Inches of a chart that has a page's half for itself.
HALF = (5.2, 3.0)


def blank_figure(width: float, height: float) -> Figure:
    """A figure that belongs to no window and no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=160, facecolor="white", layout="constrained")


def plain_axes(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=8)


def log_losses(axes: Axes) -> None:
    """A logarithmic axis of losses, with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda loss, _: f"{loss:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def sample_grids(grids: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]], *, columns: int = 8) -> Figure:
    """Every model's samples as a grid, side by side, in the same order; dark on light for single-channel images.

    Args:
        grids: title to ``(n, channels, height, width)`` in [-1, 1], 1 or 3 channels; a list of such has one row of
            grids for each.
        columns: images in a row of a grid.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: there is no grid, or the grids' shapes differ.

    Example:
        >>> import torch
        >>> figure = sample_grids({"original": torch.zeros(8, 3, 8, 8), "pruned": torch.ones(8, 3, 8, 8)})
        >>> [axes.get_title() for axes in figure.axes]
        ['original', 'pruned']
    """
    rows = [grids] if isinstance(grids, Mapping) else list(grids)
    shapes = {tuple(images.shape) for row in rows for images in row.values()}
    if len(shapes) != 1:
        raise ValueError(
            f"the grids' images are {sorted(shapes)}: pass at least one grid, all made from the same noise"
        )
    n, channels = next(iter(shapes))[:2]
    if channels not in (1, 3):
        raise ValueError(f"images have {channels} channels: decode latents to 1 or 3 channels first")
    across, high = max(len(row) for row in rows), -(-n // columns)
    figure = blank_figure(3.2 * across, (3.2 * high / columns + 0.3) * len(rows))
    for line, row in zip(figure.subplots(len(rows), across, squeeze=False), rows, strict=True):
        for axes in line:
            axes.set_axis_off()
        for axes, (title, images) in zip(line, row.items(), strict=False):
            picture = _tile(images, columns)
            axes.imshow(picture[..., 0] if channels == 1 else picture, cmap="gray_r", vmin=0, vmax=1)
            axes.set_title(title, fontsize=10, color=INK)
    return figure


def _tile(images: Tensor, columns: int) -> np.ndarray:
    """``(rows * (height + gap), columns * (width + gap), channels)`` in [0, 1]; gaps and missing images are blank."""
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy()
    n, height, width, channels = pixels.shape
    rows, gap = -(-n // columns), gap_of(height)
    blank = 0.0 if channels == 1 else 1.0
    padded = np.full((rows * columns, height + gap, width + gap, channels), blank, pixels.dtype)
    padded[:n, :height, :width] = pixels
    grid = padded.reshape(rows, columns, height + gap, width + gap, channels).transpose(0, 2, 1, 3, 4)
    return grid.reshape(rows * (height + gap), columns * (width + gap), channels)


def gap_of(height: int) -> int:
    """Blank pixels between the images of a grid."""
    return max(1, height // 8)


def loss_curve(curve: LossCurve) -> Figure:
    """The loss at each timestep relative to its largest, with the threshold that says which timesteps are scored.

    Args:
        curve: ``result.scores.curve``.

    Returns:
        A matplotlib figure.

    Example:
        >>> from diffprune_fast.scoring import LossCurve
        >>> figure = loss_curve(LossCurve(np.array([0, 500, 999]), np.array([1.0, 0.2, 0.01]), threshold=0.05))
        >>> figure.axes[0].get_yscale()
        'log'
    """
    timesteps, relative = np.asarray(curve.timesteps), np.asarray(curve.relative)
    figure = blank_figure(*HALF)
    axes = figure.subplots()
    plain_axes(axes)
    axes.plot(timesteps, relative, color=ACCENT, marker="o", markersize=3.5, linewidth=1.4)
    lowest = min(float(relative[relative > 0].min()), curve.threshold or 1.0)
    axes.set_yscale("log")
    axes.set_ylim(lowest * 0.6, 1.6)
    if curve.threshold > 0:
        axes.axhline(curve.threshold, color=INK, linewidth=0.9, linestyle="--")
        axes.annotate(
            f"threshold {curve.threshold:g}",
            (timesteps[-1], curve.threshold),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=INK,
        )
    first, last = curve.kept
    scored = np.unique(np.append(timesteps[(timesteps >= first) & (timesteps <= last)], (first, last)))
    axes.fill_between(
        scored, lowest * 0.6, np.interp(scored, timesteps, relative), color=PALE, linewidth=0, label="scored timesteps"
    )
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    axes.set_xlabel("timestep t", fontsize=9, color=INK)
    axes.set_ylabel("loss relative to largest", fontsize=9, color=INK)
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    return figure


def kept_channels(plan: Plan, keep: Mapping[str, np.ndarray]) -> Figure:
    """One bar per group, in the order in which a forward reaches them: how many of its units stay, of how many.

    Args:
        plan: what :func:`diffprune_fast.trace` gave.
        keep: group name to the units that stay.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: the plan has no groups.

    Example:
        >>> import torch
        >>> from diffprune_fast import trace
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Linear(16, 2))
        >>> figure = kept_channels(trace(model, (torch.zeros(1, 4),)), {"0": np.arange(4)})
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['4 of 16']
    """
    if not plan.groups:
        raise ValueError("the plan has no groups: nothing in this model can be removed")
    order = _forward_order(plan)
    names = [plan.groups[i].name for i in order]
    full, kept = plan.counts()[order], plan.counts(keep)[order]
    share = kept / full
    place = np.arange(len(names))
    figure = blank_figure(7.6, 0.21 * len(names) + 0.6)
    axes = figure.subplots()
    plain_axes(axes)
    axes.barh(place, 1.0, color=PALE, height=0.72)
    axes.barh(place, share, color=ACCENT, height=0.72)
    for y, (k, n) in enumerate(zip(kept.tolist(), full.tolist(), strict=True)):
        axes.text(1.01, y, f"{k} of {n}", va="center", fontsize=7, color=INK)
    axes.set_yticks(place, names, fontsize=7, color=INK)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.0)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25%", "50%", "75%", "100%"])
    axes.set_xlabel("units that stay", fontsize=8, color=INK)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def _forward_order(plan: Plan) -> np.ndarray:
    """The groups' indices by the first operation that has a width of theirs; those of none come last."""
    first = np.full(len(plan.groups), len(plan.costs))
    for step, cost in enumerate(plan.costs):
        reached = (plan.extents.per_group[list(cost.extents)] != 0).any(axis=0)
        first[reached] = np.minimum(first[reached], step)
    return np.argsort(first, kind="stable")


def tradeoff(
    costs: Sequence[float], losses: Mapping[str, Sequence[float]], dense: float, *, cost: str = "MACs"
) -> Figure:
    """Losses against the share of the cost that stays, with the dense model's as a line.

    Args:
        costs: ``(n,)`` shares of the dense model's cost.
        losses: label to ``(n,)`` losses; the last is drawn strongest.
        dense: the dense model's loss.
        cost: what the shares are of, for the axis.

    Returns:
        A matplotlib figure.

    Example:
        >>> figure = tradeoff([0.3, 0.5, 0.7], {"sliced": [0.2, 0.1, 0.05], "compensated": [0.06, 0.04, 0.03]}, 0.03)
        >>> figure.axes[0].get_xlabel()
        'share of the MACs'
    """
    order = np.argsort(costs)
    figure = blank_figure(5.2, 3.2)
    axes = figure.add_subplot()
    plain_axes(axes)
    axes.axhline(dense, color=MUTED, linewidth=1, linestyle="--", label="dense")
    for i, (label, values) in enumerate(losses.items()):
        last = i == len(losses) - 1
        (line,) = axes.plot(np.array(costs)[order], np.array(values)[order], marker="o", markersize=3, label=label)
        line.set(color=ACCENT if last else MUTED, linewidth=1.8 if last else 1.0)
    axes.set_xlabel(f"share of the {cost}", color=INK, fontsize=9)
    axes.set_ylabel("loss", color=INK, fontsize=9)
    log_losses(axes)
    axes.legend(frameon=False, fontsize=8)
    return figure
