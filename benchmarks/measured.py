"""Bandwidth of this machine, the digits model that comparisons use, and the table that a benchmark run leaves."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

clock = time.perf_counter  # conftest takes --benchmark-timer's
DIGITS = Path(__file__).parents[1] / "examples" / "digits"
LARGEST = 1 << 30  # bytes: above, bandwidth doesn't change any more


MOVED = 0.2  # a round is thrown away where the probe moved by more in it

ATTEMPTS = 3  # so many times the rounds that are wanted, at most


@dataclass
class Row:
    """One provider on one shape. Times in ms, bandwidths in GB/s (1e9 bytes), all of them medians over the rounds."""

    operation: str
    shape: str
    provider: str
    median: float
    p20: float
    p80: float
    over: dict[str, float] = field(default_factory=dict)  # times faster than another provider in the same round
    rate: float | None = None  # bytes that must be read and written
    of_read: float | None = None  # the share of the bandwidth, probed in the same round, of reading as many bytes
    of_copy: float | None = None
    error: float | None = None  # largest relative difference to float64, or 0 for exact equality
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Round:
    """Every provider once, and the bandwidths probed around them in GB/s (0: not probed)."""

    seconds: dict[str, float]
    read: float = 0.0
    copy: float = 0.0


Work = Callable[[], float]
"""One call of a provider; returns its seconds."""


def work(call: Callable[..., Any], setup: Callable[[], tuple[Any, ...]] = tuple) -> Work:
    """``call(*setup())``, of which the setup, and letting go of what comes back, are not timed."""

    def run() -> float:
        arguments = setup()
        begin = clock()
        out = call(*arguments)
        took = clock() - begin
        del out
        return took

    return run


def warm_up(run: Work) -> None:
    """Calls that don't count, until two in a row take as long (a compiler's first ones don't), or have taken 3 s."""
    begin = time.perf_counter()
    before = run()
    while time.perf_counter() - begin < 3:
        took = run()
        if abs(took - before) < 0.2 * before:
            return
        before = took


class Probe:
    """Bandwidth of reading and of copying (bytes read + written) working sets of about ``n_bytes``, median of five.

    Reading: two arrays into sums, PyTorch's own kernel. Copying: into memory that is already there.
    """

    def __init__(self, n_bytes: int) -> None:
        self._n = max(1 << 20, min(n_bytes, LARGEST)) // 8
        self._a, self._b = torch.ones(self._n), torch.ones(self._n)

    def __call__(self) -> tuple[float, float]:
        read = work(lambda: (self._a.sum(), self._b.sum()))
        copy = work(lambda: self._b.copy_(self._a))
        first, second = (float(np.median([run() for _ in range(5)])) for run in (read, copy))
        return 8 * self._n / first / 1e9, 8 * self._n / second / 1e9


def compare(works: Mapping[str, Work], n_bytes: int, rounds: int, budget: float = 8.0) -> tuple[list[Round], int]:
    """Rounds of all providers, each time another one first, and how many rounds were thrown away.

    A round in which the bandwidth moved by more than a fifth was disturbed and doesn't count. Where that is true of
    all, they count nevertheless (the machine is loaded), and so the second figure says. budget: seconds, after which
    three rounds are enough.
    """
    for run in works.values():
        warm_up(run)
    probe = Probe(n_bytes) if n_bytes else None
    good: list[Round] = []
    bad: list[Round] = []
    names, begin = list(works), time.perf_counter()
    while len(good) < rounds and (done := len(good) + len(bad)) < ATTEMPTS * rounds:
        if done >= 3 and time.perf_counter() - begin > budget:
            break
        before = probe() if probe else (0.0, 0.0)
        first = done % len(names)
        seconds = {name: works[name]() for name in names[first:] + names[:first]}
        after = probe() if probe else (0.0, 0.0)
        moved = max(abs(y - x) / x if x else 0.0 for x, y in zip(before, after))
        (bad if moved > MOVED else good).append(Round(seconds, *[(x + y) / 2 for x, y in zip(before, after)]))
    return good or bad, len(bad)


def rows_of(
    operation: str, shape: str, rounds: Sequence[Round], thrown: int, n_bytes: int, errors: Mapping[str, float | None]
) -> list[Row]:
    """A row for each provider; ratios are medians of those of the rounds."""
    names, rows = list(rounds[0].seconds), []
    for name in names:
        mine = [r.seconds[name] for r in rounds]
        over = {
            other: float(np.median([r.seconds[other] / r.seconds[name] for r in rounds]))
            for other in names
            if other != name
        }
        row = Row(operation, shape, name, *percentiles(mine), over, error=errors.get(name))
        if n_bytes:
            row.rate = n_bytes / row.median / 1e6
            row.of_read = float(np.median([n_bytes / r.seconds[name] / 1e9 / r.read for r in rounds]))
            row.of_copy = float(np.median([n_bytes / r.seconds[name] / 1e9 / r.copy for r in rounds]))
        if thrown and not rows:
            row.notes["rounds"] = f"{len(rounds)}, and {thrown} in which the bandwidth moved by over a fifth"
        rows.append(row)
    return rows


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


def write(rows: list[Row], directory: Path, name: str) -> str:
    """``name``.json and ``name``.md; returns the Markdown."""
    about = machine()
    directory.mkdir(parents=True, exist_ok=True)
    records = [asdict(row) for row in rows]
    (directory / f"{name}.json").write_text(json.dumps({"about": about, "rows": records}, indent=1) + "\n")
    text = [f"<!-- {', '.join(f'{k} {v}' for k, v in about.items())} -->"]
    for operation in dict.fromkeys(row.operation for row in rows):
        mine = [row for row in rows if row.operation == operation]
        text += ["", f"### {operation}", ""]
        others = [p for p in dict.fromkeys(r.provider for r in mine) if p != "cpu"]
        titles = ["shape", "provider", "median ms (p20-p80)", "GB/s", "of read", "of copy", "error"]
        titles += [f"x {p}" for p in others]
        text += ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
        text += ["| " + " | ".join(_cells(row, others)) + " |" for row in mine]
        for row in mine:
            text += [f"\n{row.shape}, {row.provider}: {_notes(row)}"] if row.notes else []
    (directory / f"{name}.md").write_text("\n".join(text) + "\n")
    return "\n".join(text)


def _cells(row: Row, others: Sequence[str]) -> list[str]:
    cells = [row.shape, row.provider, f"{row.median:.3g} ({row.p20:.3g}-{row.p80:.3g})"]
    cells += [f"{row.rate:.1f}" if row.rate else ""]
    cells += [f"{share:.0%}" if share else "" for share in (row.of_read, row.of_copy)]
    cells += ["" if row.error is None else "0" if row.error == 0 else f"{row.error:.0e}"]
    return cells + [f"{row.over[p]:.2g}" if p in row.over else "" for p in others]


def _notes(row: Row) -> str:
    return ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.notes.items()
    )
