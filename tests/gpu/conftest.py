"""Tests that need a GPU. DIFFPRUNE_GPU_TESTS=cpu runs them on the CPU's backends instead: a rehearsal of the tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

REHEARSAL = os.environ.get("DIFFPRUNE_GPU_TESTS") == "cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        if not REHEARSAL or "needs_cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def repeats() -> int:
    """How often a test that looks for rare failures runs."""
    return 1000 if torch.cuda.is_available() else 20
