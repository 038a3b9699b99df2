"""The beginning of the long run that ``fuzz_checkpoint.py`` is for."""

from __future__ import annotations

import pytest
from fuzz_checkpoint import run_random


@pytest.mark.filterwarnings("ignore")  # of classes that are built from nonsense
@pytest.mark.parametrize(("target", "runs"), [("manifest", 40), ("config", 25), ("index", 300)])
def test_a_mutated_checkpoint_loads_or_is_refused(target: str, runs: int) -> None:
    counts = run_random(target, runs)
    assert sum(counts.values()) == runs
    assert min(counts.values()) > 0
