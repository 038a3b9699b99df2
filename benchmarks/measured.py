"""Bandwidth of this machine, the digits model that comparisons use, and the table that a benchmark run leaves."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

clock = time.perf_counter  # conftest takes --benchmark-timer's
DIGITS = Path(__file__).parents[1] / "examples" / "digits"
LARGEST = 1 << 30  # bytes: above, bandwidth doesn't change any more


@dataclass
class Row:
    """One provider on one shape. Times in ms, bandwidths in GB/s (1e9 bytes)."""

    operation: str
    shape: str
    provider: str
    median: float
    p20: float
    p80: float
    rate: float | None = None  # bytes that must be read and written, over p20
    read: float | None = None  # bandwidth of reading as many bytes, measured just before, over its p20
    copy: float | None = None
    error: float | None = None  # largest relative difference to float64, or 0 for exact equality
    notes: dict[str, Any] = field(default_factory=dict)


def seconds(work: Callable[[], Any], rounds: int = 5) -> list[float]:
    """Times of ``rounds`` calls after one that doesn't count."""
    work()
    times = []
    for _ in range(rounds):
        begin = clock()
        work()
        times.append(clock() - begin)
    return times


def bandwidth(n_bytes: int) -> tuple[float, float]:
    """GB/s of reading and of copying (bytes read + bytes written) working sets of about ``n_bytes``, by p20.

    Reading: two arrays into sums, PyTorch's own kernel. Copying: into memory that is already there.
    """
    n = max(1 << 20, min(n_bytes, LARGEST)) // 8
    a, b = torch.ones(n), torch.ones(n)
    read = np.percentile(seconds(lambda: (a.sum(), b.sum()), 7), 20)
    copy = np.percentile(seconds(lambda: b.copy_(a), 7), 20)
    return float(8 * n / read / 1e9), float(8 * n / copy / 1e9)


def percentiles(times: list[float]) -> tuple[float, float, float]:
    """Median, p20 and p80 in ms."""
    p20, median, p80 = np.percentile(np.array(times) * 1e3, [20, 50, 80])
    return float(median), float(p20), float(p80)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    from diffprune_fast.ops import cpu

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
    return {
        "date": time.strftime("%Y-%m-%d"), "commit": commit, "machine": platform.machine(), "simd": cpu.simd(),
        "threads": torch.get_num_threads(), "clock": clock.__name__, "load": round(os.getloadavg()[1], 1), **versions,
    }  # fmt: skip


def comparison_arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that all comparisons on the digits model have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DIGITS / "model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON with every run; a table in Markdown beside it")
    return parser


def digits_model(args: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """The model in single precision, its scheduler, the images to train on and those that were held out."""
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.utils import logging

    sys.path.insert(0, str(DIGITS))
    from data import digits

    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    model = UNet2DModel.from_pretrained(args.model).float().eval()
    return model, DDPMScheduler.from_pretrained(args.model), *digits()


def provenance(args: argparse.Namespace) -> dict[str, Any]:
    """What a comparison's report begins with."""
    from diffprune_fast import __version__

    return {
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": args.threads},
        "versions": {"diffprune_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": machine()["commit"],
    }


def write_comparison(out: Path | None, report: dict[str, Any], about: str) -> None:
    """``out`` and, once the report has its table, the Markdown beside it; nothing where no file was asked for."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    if "table" in report:
        out.with_suffix(".md").write_text("\n".join([about, "", "```", *report["table"], "```", ""]))


def ratio(row: Row, rows: list[Row], provider: str) -> float | None:
    """How many times faster ``row`` is than ``provider`` on the same shape."""
    for other in rows:
        if (other.operation, other.shape, other.provider) == (row.operation, row.shape, provider):
            return other.median / row.median
    return None


def write(rows: list[Row], directory: Path, name: str) -> str:
    """``name``.json and ``name``.md; returns the Markdown."""
    about = machine()
    directory.mkdir(parents=True, exist_ok=True)
    records = [asdict(row) | {"over_reference": ratio(row, rows, "reference")} for row in rows]
    (directory / f"{name}.json").write_text(json.dumps({"about": about, "rows": records}, indent=1) + "\n")
    text = [f"<!-- {', '.join(f'{k} {v}' for k, v in about.items())} -->"]
    for operation in dict.fromkeys(row.operation for row in rows):
        mine = [row for row in rows if row.operation == operation]
        text += ["", f"### {operation}", ""]
        others = [p for p in dict.fromkeys(r.provider for r in mine) if p != "cpu"]
        titles = ["shape", "provider", "median ms (p20-p80)", "GB/s", "of read", "of copy", "error"]
        titles += [f"x {p}" for p in others]
        text += ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
        text += ["| " + " | ".join(_cells(row, mine, others)) + " |" for row in mine]
        for row in mine:
            text += [f"\n{row.shape}, {row.provider}: {_notes(row)}"] if row.notes else []
    (directory / f"{name}.md").write_text("\n".join(text) + "\n")
    return "\n".join(text)


def _cells(row: Row, rows: list[Row], others: list[str]) -> list[str]:
    def percent(whole: float | None) -> str:
        return f"{row.rate / whole:.0%}" if row.rate and whole else ""

    cells = [row.shape, row.provider, f"{row.median:.3g} ({row.p20:.3g}-{row.p80:.3g})"]
    cells += [f"{row.rate:.1f}" if row.rate else "", percent(row.read), percent(row.copy)]
    cells += ["" if row.error is None else "0" if row.error == 0 else f"{row.error:.0e}"]
    for provider in others:
        value = ratio(row, rows, provider)
        cells.append("" if value is None or provider == row.provider else f"{value:.1f}")
    return cells


def _notes(row: Row) -> str:
    return ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.notes.items()
    )
