"""Which versions of Torch-Pruning are taken."""

from __future__ import annotations

import runpy
import sys
from types import ModuleType
from typing import Any

import pytest

from diffprune_fast.integrations.torch_pruning import library


def test_an_older_version_is_refused_with_those_that_work(monkeypatch: pytest.MonkeyPatch) -> None:
    old: Any = ModuleType("torch_pruning")
    old.dependency = ModuleType("torch_pruning.dependency")
    monkeypatch.setitem(sys.modules, "torch_pruning", old)
    with pytest.raises(ImportError, match=r"1\.6\.0 and 1\.6\.1, the one installed is older"):
        runpy.run_path(str(library.__file__))


def test_none_at_all_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match="isn't installed: pip install"):
        runpy.run_path(str(library.__file__))
