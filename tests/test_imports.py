"""What a call doesn't need isn't imported by it."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["diffusers", "scipy.stats", "transformers", "torch._dynamo"])
def test_the_whole_way_is_there_without(module: str):
    code = f"import sys, diffprune_fast; diffprune_fast.score_and_prune; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("module", ["torch", "numpy"])
def test_the_package_is_imported_without(module: str):
    code = f"import sys, diffprune_fast; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
