"""Collects every benchmark's row and writes ``benchmarks/results/cpu.md`` and ``cpu.json`` when all have run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measured
import pytest
import torch

ROWS: list[measured.Row] = []
TEXT = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", default=str(Path(__file__).parent / "results"), help="folder of the tables")
    parser.addoption("--threads", type=int, help="instead of PyTorch's own number")
    parser.addoption("--table", default="cpu", help="name of the tables")


def pytest_configure(config: pytest.Config) -> None:
    """``--threads 1 --benchmark-timer time.process_time`` measures CPU time, where a machine is shared."""
    if str(config.getoption("benchmark_timer")).endswith("process_time"):
        measured.clock = time.process_time
    if threads := config.getoption("--threads"):
        torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:  # compilers and other libraries warn; that is not what is measured
        item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture
def timed(benchmark: Any) -> Callable[..., measured.Row]:
    """Times ``work`` and keeps its row: ``timed(operation, shape, provider, work, n_bytes=…, error=…)``."""

    def run(
        operation: str,
        shape: str,
        provider: str,
        work: Callable[..., Any],
        *,
        n_bytes: int = 0,
        error: float | None = None,
        rounds: int = 7,
        setup: Callable[[], Any] | None = None,
        **notes: Any,
    ) -> measured.Row:
        read, copy = measured.bandwidth(n_bytes) if n_bytes else (None, None)
        benchmark.group = f"{operation} {shape}"
        benchmark.pedantic(work, setup=setup, rounds=rounds, iterations=1, warmup_rounds=1)
        median, p20, p80 = measured.percentiles(benchmark.stats.stats.data)
        rate = n_bytes / p20 / 1e6 if n_bytes else None
        row = measured.Row(operation, shape, provider, median, p20, p80, rate, read, copy, error, notes)
        ROWS.append(row)
        return row

    return run


@pytest.fixture
def record_stages() -> Callable[[str, str, dict[str, Any]], None]:
    """Keeps rows of a run that timed itself: one per stage and one for all of them."""

    def record(model: str, provider: str, result: dict[str, Any]) -> None:
        stages = result["seconds"]
        for stage, value in {**stages, "all": sum(stages.values())}.items():
            ms = value * 1e3
            row = measured.Row("structural part", f"{model} {stage}", provider, ms, ms, ms)
            if stage == "all":
                row.notes = {
                    "peak memory on top, MB": result["peak_extra"] / 1e6,
                    "largest tensor, MB": result["largest"] / 1e6,
                    "parameters left": result["params_after"],
                }
            ROWS.append(row)

    return record


@pytest.fixture(autouse=True)
def tables(request: pytest.FixtureRequest) -> Iterator[None]:
    """Written after every benchmark, so that a run that is stopped leaves what it has."""
    yield
    if ROWS:
        text = measured.write(ROWS, Path(request.config.getoption("--results")), request.config.getoption("--table"))
        request.config.stash[TEXT] = text


def pytest_sessionfinish(session: pytest.Session) -> None:
    print("\n" + session.config.stash.get(TEXT, "nothing was measured"))
