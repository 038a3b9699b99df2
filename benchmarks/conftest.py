"""Collects every benchmark's row and writes ``benchmarks/results/cpu.md`` and ``cpu.json`` when all have run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
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
    if hasattr(os, "sched_setaffinity"):  # no thread wanders: as many cores as threads, and the same ones for all
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: torch.get_num_threads()])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:  # compilers and other libraries warn; that is not what is measured
        item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture
def compared(benchmark: Any) -> Callable[..., list[measured.Row]]:
    """Times providers against one another and keeps their rows: ``compared(operation, shape, works, n_bytes=…)``."""

    def run(
        operation: str,
        shape: str,
        works: Mapping[str, measured.Work],
        *,
        n_bytes: int = 0,
        errors: Mapping[str, float | None] | None = None,
        rounds: int = 7,
    ) -> list[measured.Row]:
        benchmark.group = operation
        rounds_made, thrown = benchmark.pedantic(measured.compare, (works, n_bytes, rounds), rounds=1, iterations=1)
        rows = measured.rows_of(operation, shape, rounds_made, thrown, n_bytes, errors or {})
        ROWS.extend(rows)
        return rows

    return run


@pytest.fixture
def record_stages() -> Callable[[str, list[dict[str, dict[str, Any]]]], None]:
    """Keeps rows of runs that timed themselves, one round after the other: one per stage and one for all of them."""

    def record(model: str, rounds: list[dict[str, dict[str, Any]]]) -> None:
        stages = [*next(iter(rounds[0].values()))["seconds"], "all"]
        for stage in stages:
            seconds = [
                measured.Round(
                    {p: sum(r["seconds"].values()) if stage == "all" else r["seconds"][stage] for p, r in one.items()}
                )
                for one in rounds
            ]
            rows = measured.rows_of("structural part", f"{model} {stage}", seconds, 0, 0, {})
            for row in rows if stage == "all" else ():
                result = rounds[-1][row.provider]
                row.notes = {
                    "peak memory on top, MB": result["peak_extra"] / 1e6,
                    "largest tensor, MB": result["largest"] / 1e6,
                    "parameters left": result["params_after"],
                }
            ROWS.extend(rows)

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
