"""Lines over steps and timesteps: how a training went, and where over the timesteps models differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .figures import ACCENT, HALF, INK, MUTED, blank_figure, log_losses, plain_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The colours of the models between the first and the last.
BETWEEN = ("#d97706", "#059669", "#c026d3", "#0891b2")
# Steps that a point of a training's curve is the mean of, at most so many points.
POINTS = 200


def training_curve(losses: Sequence[float]) -> Figure:
    """A training's losses over its steps, smoothed: single steps differ by their timesteps.

    Args:
        losses: of every step.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: there is no loss.

    Example:
        >>> training_curve([0.3, 0.2, 0.1]).axes[0].get_xlabel()
        'step'
    """
    values = np.asarray(losses, np.float64)
    if not values.size:
        raise ValueError("there is no loss to show")
    parts = np.array_split(values, min(POINTS, max(1, values.size // 5)))
    ends = np.cumsum([len(part) for part in parts])
    figure = blank_figure(*HALF)
    axes = figure.subplots()
    plain_axes(axes)
    axes.plot(ends, [part.mean() for part in parts], color=ACCENT, linewidth=1.4)
    axes.set_xlabel("step", fontsize=9, color=INK)
    axes.set_ylabel("loss", fontsize=9, color=INK)
    return figure


def timestep_curves(losses: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Several models' losses over the timesteps; the first, the original, dashed, and the last drawn strongest.

    Args:
        losses: name of a model to ``(first timestep of a part, loss there)``, as ``evaluation.loss_by_timestep`` gives.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: there is no model.

    Example:
        >>> figure = timestep_curves({"dense": [(0, 0.3), (500, 0.1)], "pruned": [(0, 0.4), (500, 0.2)]})
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['dense', 'pruned']
    """
    if not losses:
        raise ValueError("there is no model to show")
    figure = blank_figure(*HALF)
    axes = figure.subplots()
    plain_axes(axes)
    for i, (name, points) in enumerate(losses.items()):
        last = i == len(losses) - 1
        (line,) = axes.plot([t for t, _ in points], [x for _, x in points], marker="o", markersize=3, label=name)
        line.set(color=MUTED if i == 0 else ACCENT if last else BETWEEN[(i - 1) % len(BETWEEN)])
        line.set(linewidth=1.8 if last else 1.1, linestyle="--" if i == 0 else "-")
    log_losses(axes)
    axes.set_xlabel("timestep t", fontsize=9, color=INK)
    axes.set_ylabel("loss", fontsize=9, color=INK)
    axes.legend(frameon=False, fontsize=8)
    return figure
