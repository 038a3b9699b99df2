"""What the Markdown files point at is there: links, paths, names and the signatures of docs/api.md."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from documented import PAGE, writer
from models import CASES
from zoo import MORE, TRANSFORMERS, ZOO

import diffprune_fast
from diffprune_fast import Plan

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(p for d in ("docs", "diffprune_fast", "benchmarks", "tests") for p in (ROOT / d).rglob("*.md")),
    ]
)
API = ROOT / "docs" / "api.md"
# In these a path in backticks is one of the repository; others (`demo/`, `unet/`) are written by a run.
FOLDERS = ("benchmarks", "csrc", "diffprune_fast", "docs", "examples", "kernels", "tests")
WRITTEN_BY_A_RUN = {"benchmarks/gpu/wheels"}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page: Path) -> None:
    lost, text = [], page.read_text(encoding="utf-8")
    for link in re.findall(r"(?<!\w)\[[^\]]*\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert not lost


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_in_backticks_exist(page: Path) -> None:
    quoted = re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
    paths = [word for text in quoted for word in text.split() if re.match(rf"({'|'.join(FOLDERS)})/[\w./<>*-]*$", word)]
    assert not [p for p in {*paths} - WRITTEN_BY_A_RUN if not any(ROOT.glob(re.sub(r"<\w+>", "*", p.rstrip("/"))))]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_in_backticks_are_in_the_rooms(page: Path) -> None:
    rooms = "|".join(p.parent.name for p in (ROOT / "diffprune_fast").glob("*/__init__.py"))
    found = re.findall(
        rf"`(?:diffprune_fast\.)?({rooms})\.([a-z]\w*)[`(]", page.read_text(encoding="utf-8"), re.IGNORECASE
    )
    lost = [f"{room}.{name}" for room, name in found if name not in ("py", "pt") and not in_room(room, name)]
    assert not lost


def in_room(room: str, name: str) -> bool:
    module = importlib.import_module(f"diffprune_fast.{room}")
    if room == "plan" and (name in Plan.__dataclass_fields__ or hasattr(Plan, name)):
        return True  # `plan.macs` is of a plan, not of the room
    there = ROOT / "diffprune_fast" / room / name
    return hasattr(module, name) or there.is_dir() or there.with_suffix(".py").exists()


def signatures() -> dict[str, str]:
    """Of docs/api.md: every ``name(arguments)`` of a heading or of a table's first column."""
    found = re.findall(r"^(?:### |\| )`([a-z_.]+)\((.+?)\)(?: ->.*)?`", API.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: arguments for name, arguments in found if name != "save_pretrained"}


def function(name: str) -> Any:
    places = ("diffprune_fast", "diffprune_fast.evaluation", "diffprune_fast.recovery", "diffprune_fast.checkpoint")
    if "." in name:
        room, _, name = name.rpartition(".")
        return getattr(importlib.import_module(f"diffprune_fast.{room}"), name)
    return next(getattr(m, name) for m in map(importlib.import_module, places) if hasattr(m, name))


@pytest.mark.parametrize("name", signatures())
def test_a_signature_of_the_interface_page_is_the_functions(name: str) -> None:
    text = signatures()[name].replace(" | ", "=None, ").replace(", ...", "")
    said = ast.parse(f"def f({text}): ...").body[0]
    assert isinstance(said, ast.FunctionDef)
    real = inspect.signature(function(name)).parameters
    by_position = [p.name for p in real.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [a.arg for a in said.args.args] == by_position[: len(said.args.args)]
    given = dict(zip([a.arg for a in said.args.args][::-1], said.args.defaults[::-1]))
    given |= {a.arg: d for a, d in zip(said.args.kwonlyargs, said.args.kw_defaults) if d is not None}
    for argument, default in given.items():
        assert ast.literal_eval(default) == real[argument].default, argument
    assert {a.arg for a in said.args.kwonlyargs} <= real.keys()


def test_the_interface_page_has_every_public_function() -> None:
    public = {n for n in diffprune_fast.__all__ if inspect.isfunction(getattr(diffprune_fast, n))}
    assert public <= signatures().keys()


def test_every_architecture_of_the_tests_has_its_row_and_the_rest_of_the_page_is_as_it_would_be_written() -> None:
    """What is in the rows, tests/tracing/test_zoo.py compares."""
    rows = [[writer.Row(case.name, error=0.0) for case in cases] for cases in ([*CASES, *ZOO, *MORE], TRANSFORMERS)]
    there, wanted = (
        re.sub(r"^\| ([\w.-]+) \| +\d.*$", r"\1", text, flags=re.MULTILINE)
        for text in (PAGE.read_text(encoding="utf-8"), writer.document(*rows, 0.3))
    )
    assert there == wanted
