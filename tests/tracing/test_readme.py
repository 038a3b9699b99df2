"""The walk-through of diffprune_fast/tracing/README.md says what happens."""

from __future__ import annotations

import doctest
from pathlib import Path

README = Path(__file__).parents[2] / "diffprune_fast" / "tracing" / "README.md"


def test_the_readme_of_tracing_is_true() -> None:
    result = doctest.testfile(str(README), module_relative=False)
    assert result.attempted > 10
    assert result.failed == 0
