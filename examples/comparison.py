"""Prune one model in several ways, let each recover, and show what came out: a table and a picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from diffprune_fast import score_and_prune
from diffprune_fast.plan import Complexity
from diffprune_fast.report.figures import sample_grids


def compare(
    model: nn.Module,
    loader: Any,
    ways: Mapping[str, Mapping[str, Any]],
    *,
    measures: tuple[str, ...],
    measured: Callable[[nn.Module], tuple[str, ...]],
    shown: Callable[[nn.Module], Tensor],
    recover: Callable[[nn.Module], None],
    out: Path,
    title: str,
    **options: Any,
) -> None:
    """Prune copies of ``model`` by each of ``ways`` (options of ``score_and_prune``), and finetune them in place.

    measured: one cell for each of ``measures``. shown: ``(20, 1, height, width)`` images for ``out/samples.png``.
    """
    begin = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    table = Table("scored by", "params", "MACs", *measures, *[f"{m}*" for m in measures], title=title)
    pictures = {}

    def row(name: str) -> tuple[str, ...]:
        with torch.no_grad():
            pictures[name] = shown(pruned)
            return measured(pruned)

    pruned = model
    whole = row("as trained")
    for name, way in ways.items():
        result = score_and_prune(model, loader, inplace=False, progress=False, **options, **way)
        if not table.rows:
            table.add_row("(as trained)", *_cost(result.before), *whole)
        pruned = result.model
        straight = row(name)
        recover(pruned)
        table.add_row(name, *_cost(result.after), *straight, *row(f"{name}*"))
    sample_grids(pictures, columns=5).savefig(out / "samples.png")
    Console(width=110).print(table)
    print(f"*: finetuned. {time.perf_counter() - begin:.0f} s since the training; the pictures: {out / 'samples.png'}")


def _cost(found: Complexity) -> tuple[str, str]:
    return f"{found.params / 1e3:.0f}k", f"{found.macs / 1e6:.1f}M"
