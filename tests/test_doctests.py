"""Every public function says what it takes, what it gives and how it is called; the examples run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import sys
from types import FunctionType
from typing import Any

import pytest

import diffprune_fast

# Rooms whose face is for users as it is; of the others what docs/api.md names.
FACES = ("evaluation", "recovery", "report")
NAMED = (
    "checkpoint.save",
    "depth.find_blocks",
    "footprint.count_memory",
    "footprint.measure_times",
    "objective.make_objective",
    "ops.backends",
    "ops.channel_scores_",
    "ops.slice_channels_",
    "pipelines.encoded",
    "sensitivity.measure_sensitivities",
)


def face(room: str) -> Any:
    return importlib.import_module(f"diffprune_fast.{room}")


def public() -> dict[str, FunctionType]:
    """The package's functions for users, by the name that they are called by."""
    found = {name: getattr(diffprune_fast, name) for name in diffprune_fast.__all__}
    found |= {f"{room}.{name}": getattr(face(room), name) for room in FACES for name in face(room).__all__}
    found |= {name: getattr(face(name.split(".")[0]), name.split(".")[1]) for name in NAMED}
    return {name: f for name, f in found.items() if isinstance(f, FunctionType)}


PUBLIC = public()


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_function_explains_every_argument_and_its_result(name: str) -> None:
    text = inspect.getdoc(PUBLIC[name]) or ""
    arguments = set(inspect.signature(PUBLIC[name]).parameters)
    section = re.search(r"^Args:\n((?: +.*\n?|\n)*)", text, re.MULTILINE)
    explained = re.findall(r"^    ([a-z][a-z_0-9, ]*):", section[1] if section else "", re.MULTILINE)
    assert {word for words in explained for word in words.split(", ")} == arguments
    assert re.search(r"^Returns:\n    \S", text, re.MULTILINE)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_functions_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = dict(vars(sys.modules[PUBLIC[name].__module__]))
    tests = doctest.DocTestFinder(recurse=False).find(PUBLIC[name], name, globs=names)
    assert [t for t in tests if t.examples], f"{name} has no example"
    failed = sum(doctest.DocTestRunner().run(t).failed for t in tests)
    assert not failed, capsys.readouterr().out
