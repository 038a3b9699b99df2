"""What a call doesn't need isn't imported by it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


def imported_by(code: str) -> set[str]:
    """All modules that are there after the code, in an interpreter of its own."""
    code = f"import json, sys; {code}; print(json.dumps(list(sys.modules)))"
    return set(json.loads(subprocess.check_output([sys.executable, "-c", code])))


@pytest.fixture(scope="module")
def whole_way() -> set[str]:
    return imported_by("import diffprune_fast; diffprune_fast.score_and_prune")


@pytest.mark.parametrize("module", ["diffusers", "scipy.stats", "transformers", "torch._dynamo"])
def test_the_whole_way_is_there_without(whole_way: set[str], module: str) -> None:
    assert "torch" in whole_way
    assert module not in whole_way


@pytest.mark.parametrize("module", ["torch", "numpy"])
def test_the_package_is_imported_without(module: str) -> None:
    assert module not in imported_by("import diffprune_fast")
