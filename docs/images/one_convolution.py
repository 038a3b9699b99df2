"""Draws one_convolution.svg, the picture of diffprune_fast/tracing/README.md."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle
from torch import nn

import diffprune_fast as dpf
from diffprune_fast.tracing.channels import Channels

INK, GONE, SHADES = "#222222", "#dddddd", ("#a6cee3", "#b2df8a")


def main() -> None:
    model = nn.Sequential()
    model.conv, model.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
    model.act, model.out = nn.SiLU(), nn.Conv2d(8, 3, 1)
    plan, start = dpf.trace(model, (torch.zeros(1, 3, 8, 8),)), Channels.of(model).start
    group, rows = plan["conv"], plan.constraints[0].rows.tolist()
    plt.rcParams["svg.hashsalt"] = "one_convolution"
    axes = plt.figure(figsize=(9, 4.6)).add_axes((0, 0, 1, 1))
    axes.set(xlim=(-1.75, 5.7), ylim=(8.6, -1.3))
    axes.axis("off")
    for unit in range(group.n_units):
        removed, shade = unit in (1, 5), SHADES[[unit in row for row in rows].index(True)]
        axes.plot([0, len(group.members) - 0.5], [unit + 0.5] * 2, color=GONE if removed else INK, lw=1.5, zorder=0)
        axes.text(-0.1, unit + 0.5, f"unit {unit}", ha="right", va="center", color=INK)
        if removed:
            axes.text(4.95, unit + 0.5, "removed", va="center", color=INK)
        for i, m in enumerate(group.members):
            box = Rectangle(
                (i + 0.1, unit + 0.1), 0.8, 0.8, fc="white" if removed else shade, ec=GONE if removed else INK
            )
            axes.add_patch(box)
            channel = start[m.parameter, m.dim] + int(m.index[unit, 0])
            axes.text(i + 0.5, unit + 0.5, str(channel), ha="center", va="center", color=GONE if removed else INK)
    for i, m in enumerate(group.members):
        axes.text(i + 0.5, -0.1, f"{m.parameter}\ndim {m.dim}", ha="center", va="bottom", color=INK)
    for i, row in enumerate(rows):
        axes.plot([-0.75, -0.85, -0.85, -0.75], [row[0] + 0.1] * 2 + [row[-1] + 0.9] * 2, color=INK, lw=1)
        axes.text(-0.95, sum(row) / 4 + 0.5, f"norm\ngroup {i}", ha="right", va="center", color=INK)
    axes.text(
        2.5,
        8.4,
        "a box: a channel and its id · a line: edges · a row: a unit · all rows: the group 'conv'",
        ha="center",
    )
    plt.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
