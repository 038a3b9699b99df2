"""Lines over steps and timesteps: how a training went, and where over the timesteps models differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .figures import INK, blank_figure, plain_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    figure = blank_figure(6.4, 3.0)
    axes = figure.subplots()
    plain_axes(axes)
    axes.plot(ends, [part.mean() for part in parts], color="#2563eb", linewidth=1.4)
    axes.set_xlabel("step", fontsize=9, color=INK)
    axes.set_ylabel("loss", fontsize=9, color=INK)
    return figure


def timestep_curves(losses: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Several models' losses over the timesteps.

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
    figure = blank_figure(6.4, 3.0)
    axes = figure.subplots()
    plain_axes(axes)
    for name, points in losses.items():
        axes.plot([t for t, _ in points], [x for _, x in points], marker="o", markersize=3, linewidth=1.2, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("timestep t", fontsize=9, color=INK)
    axes.set_ylabel("loss", fontsize=9, color=INK)
    axes.legend(frameon=False, fontsize=8)
    return figure
