"""The code of docs/backend.md runs, and so do the examples of what it describes."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import pytest

from diffprune_fast.integrations import torch_pruning

PAGE = Path(__file__).parents[2] / "docs" / "backend.md"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_pages_code_runs_from_top_to_bottom() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    assert blocks


@pytest.mark.parametrize("name", torch_pruning.__all__)
def test_an_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    thing = getattr(torch_pruning, name)
    finder = doctest.DocTestFinder(recurse=False)
    failed = sum(
        doctest.DocTestRunner().run(t).failed for t in finder.find(thing, name, globs=vars(torch_pruning).copy())
    )
    assert not failed, capsys.readouterr().out
