"""What every step of the GPU suite shares: the device, the clock, the copy bandwidth, the file with the rows."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]


class Step:
    """One step of the suite: its arguments, and the rows that it leaves.

    rehearsal: on the CPU with tiny sizes; its figures mean nothing.
    """

    def __init__(self, name: str, description: str) -> None:
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--json", type=Path, required=True, help="file for the rows")
        parser.add_argument("--dry-run", action="store_true", help="on the CPU, at tiny sizes")
        parser.add_argument("--only", default="", help="models, comma-separated")
        parser.add_argument("--part", default="", help="which part of the step, where it has several")
        args = parser.parse_args()
        if not args.dry_run and not torch.cuda.is_available():
            raise SystemExit("no CUDA device: --dry-run rehearses this on the CPU")
        self.name, self.path, self.rehearsal = name, args.json, args.dry_run
        self.only, self.part = set(filter(None, args.only.split(","))), args.part
        self.device = torch.device("cpu" if args.dry_run else "cuda")
        if self.rehearsal:
            torch.set_num_threads(1)
        self.rows: list[dict[str, Any]] = []
        self._begin = time.perf_counter()

    def row(self, **fields: Any) -> None:
        """Keep a row, print it, and write the file: a step that is stopped has left what it measured."""
        self.rows.append(fields)
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in fields.items()), flush=True)
        content = {"step": self.name, "about": about(self.device), "rehearsal": self.rehearsal}
        content |= {"seconds": time.perf_counter() - self._begin, "rows": self.rows}
        self.path.write_text(json.dumps(content, indent=1) + "\n")

    def failed(self, **fields: Any) -> None:
        """Keep a provider that couldn't run, with the reason."""
        self.row(**fields)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def attempt(self, **labels: Any) -> Iterator[None]:
        """What fails inside is a row with the reason, not the end of the step."""
        try:
            yield
        except Exception as problem:
            self.failed(**labels, problem=reason(problem))

    def wants(self, model: str) -> bool:
        return not self.only or model in self.only

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def milliseconds(
        self, work: Callable[..., Any], rounds: int = 20, setup: Callable[[], Any] = lambda: None, wall: bool = False
    ) -> list[float]:
        """Times of ``rounds`` calls ``work(setup())`` after two that don't count.

        By device events, or with ``wall`` by the host's clock up to the device's last kernel.
        """
        rounds = 2 if self.rehearsal else rounds
        times = []
        for i in range(rounds + 2):
            argument = setup()
            self.synchronize()
            if wall or self.device.type != "cuda":
                begin = time.perf_counter()
                work(argument)
                self.synchronize()
                taken = (time.perf_counter() - begin) * 1e3
            else:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                work(argument)
                end.record()
                end.synchronize()
                taken = start.elapsed_time(end)
            if i >= 2:
                times.append(taken)
        return times

    def copy_bandwidth(self, n_bytes: int = 4 << 30) -> float:
        """GB/s of a device-to-device copy, bytes read and written both counted."""
        n = (1 << 24 if self.rehearsal else n_bytes) // 4
        a, b = torch.randn(n, device=self.device), torch.empty(n, device=self.device)
        times = self.milliseconds(lambda _: b.copy_(a))
        return 2 * a.nbytes / float(np.median(times)) / 1e6


def spread(times: list[float]) -> dict[str, float]:
    """Median, p20 and p80 in ms."""
    p20, median, p80 = np.percentile(times, [20, 50, 80])
    return {"ms": float(median), "p20": float(p20), "p80": float(p80)}


def about(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        pass
    return {"device": name, **versions, "date": time.strftime("%Y-%m-%d")}


def reason(error: BaseException) -> str:
    """An error in a table's cell."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
