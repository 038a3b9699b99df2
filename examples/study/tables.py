"""The study's lines as tables in markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr

Row = dict[str, Any]
STAGES = ("sliced", "compensated", "distilled", "finetuned")
FIGURES = (("loss", "loss", 4), ("likeness", "ssim", 3), ("likeness", "frechet", 1))


def tables(rows: Sequence[Row]) -> str:
    """One section for every model: the dense model and its control, a table for every budget, the scores' ranks."""
    parts = []
    for model in _unique(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model and "why" not in row]
        parts.append(f"## {model}\n\n{_dense(mine)}")
        for budget in sorted({r["budget"] for r in mine if r.get("criterion", "dense") != "dense"}, reverse=True):
            of_budget = [r for r in mine if r.get("budget") == budget and r["criterion"] != "dense"]
            parts.append(f"### {model}, {budget:.0%} of the MACs\n\n{_methods(of_budget, _dense_loss(mine))}")
        damage = [r for r in mine if r["measure"] == "damage"]
        if len(damage) > 2:
            parts.append(f"### {model}, scores against the damage of single clusters\n\n{_ranks(damage)}")
    return "\n\n".join(parts)


def _dense(rows: Sequence[Row]) -> str:
    mine = [r for r in rows if r.get("criterion") == "dense"]
    body = [[stage, *_figures([r for r in mine if r["stage"] == stage])] for stage in _unique(r["stage"] for r in mine)]
    return _markdown(["", "loss", "SSIM", "Fréchet distance", "seeds"], body)


def _dense_loss(rows: Sequence[Row]) -> float | None:
    return next((r["loss"] for r in rows if r.get("stage") == "dense" and r["measure"] == "loss"), None)


def _methods(rows: Sequence[Row], dense: float | None) -> str:
    """Criterion and allocation down, loss at every stage across, then SSIM and Fréchet distance; the best in bold.

    dense: the dense model's loss; where it is known every mean loss is also given as a multiple of it.
    """
    stages = [s for s in STAGES if any(r["stage"] == s for r in rows)]
    columns = [(s, *figure) for figure in FIGURES for s in stages if any(figure[1] in r for r in rows)]
    grouped: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for r in rows:
        grouped[r["allocation"], r["criterion"], r["variant"]].append(r)
    cells = {method: [_values(own, *column[:3]) for column in columns] for method, own in grouped.items()}
    best = [_best([c[i] for c in cells.values()], column[2]) for i, column in enumerate(columns)]
    body = []
    for (allocation, criterion, variant), values in cells.items():
        own = grouped[allocation, criterion, variant]
        words = [
            _spread(v, column[3], b, dense if column[2] == "loss" else None)
            for v, column, b in zip(values, columns, best)
        ]
        name = criterion if variant == "plain" else f"{criterion}, {variant}"
        body.append([allocation, name, *words, f"{own[0]['params'] / 1e6:.2f}M", str(len({r["seed"] for r in own}))])
    names = {"loss": "loss", "ssim": "SSIM", "frechet": "FD"}
    heads = [f"{names[figure]}, {stage}" for stage, _, figure, _ in columns]
    return _markdown(["allocation", "criterion", *heads, "params", "seeds"], body)


def _ranks(rows: Sequence[Row]) -> str:
    body = []
    for score in rows[0]["scores"]:
        says = [r["scores"][score] for r in rows]
        cells = []
        for truth in ("damage", "compensated"):
            known = [truth in r for r in rows]
            cells.append(f"{spearmanr(says, [r[truth] for r in rows]).statistic:.2f}" if all(known) else "")
        body.append([score, *cells])
    heads = [f"score ({len(rows)} clusters)", "Spearman with the damage, sliced", "compensated"]
    return _markdown(heads, body)


def _values(rows: Sequence[Row], stage: str, measure: str, figure: str) -> list[float]:
    return [r[figure] for r in rows if r["stage"] == stage and r["measure"] == measure]


def _best(columns: Iterable[list[float]], figure: str) -> float | None:
    means = [float(np.mean(v)) for v in columns if v]
    if len(means) < 2:  # nothing to be better than
        return None
    return max(means) if figure == "ssim" else min(means)


def _figures(rows: Sequence[Row]) -> list[str]:
    found = [_spread([r[figure] for r in rows if r["measure"] == m], digits) for m, figure, digits in FIGURES]
    return [*found, str(len({r["seed"] for r in rows}))]


def _spread(values: Sequence[float], digits: int, best: float | None = None, unit: float | None = None) -> str:
    """The mean, the range where there is more than one, and the mean as a multiple of ``unit``."""
    if not values:
        return ""
    mean = float(np.mean(values))
    text = f"{mean:.{digits}f}"
    if best is not None and mean == best:
        text = f"**{text}**"
    text += "" if len(values) == 1 else f" ({min(values):.{digits}f}–{max(values):.{digits}f})"
    return text if unit is None else f"{text} ×{mean / unit:.2f}"


def _markdown(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
