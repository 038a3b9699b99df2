"""No import runs up, and no two files import each other in a circle."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffprune_fast"
ARCHITECTURE = ROOT / "docs" / "architecture.md"


@cache
def rooms() -> tuple[str, ...]:
    """The rooms of docs/architecture.md's table, lowest first."""
    table = ARCHITECTURE.read_text(encoding="utf-8").split("## Rooms", 1)[1].split("\n## ", 1)[0]
    return tuple(re.findall(r"^\| `([a-z_]+)(?:/|\.py)` \|", table, re.MULTILINE))


def room_of(file: Path) -> str:
    first = file.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def files() -> list[Path]:
    outer = {PACKAGE / "__init__.py", PACKAGE / "__main__.py"}
    return sorted({*PACKAGE.rglob("*.py")} - outer)


def imported(file: Path) -> set[Path]:
    """The package's files that ``file`` imports, wherever in it: also for type checkers and inside functions."""
    package = file.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {as_file(tuple(name.name.split("."))) for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            found |= {as_file((*module, name.name)) or as_file(module) for name in node.names}
    return {f for f in found if f is not None and f != file}


@cache
def as_file(module: tuple[str, ...]) -> Path | None:
    if not module or module[0] != PACKAGE.name or len(module) == 1:
        return None
    path = ROOT.joinpath(*module)
    return next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.exists()), None)


def test_every_room_stands_in_the_table() -> None:
    assert {room_of(f) for f in files()} - {"kernels"} == set(rooms())


@pytest.mark.parametrize("room", rooms())
def test_no_import_runs_up(room: str) -> None:
    order = {name: i for i, name in enumerate(rooms())}
    up = [
        f"{file.relative_to(ROOT)} imports {other.relative_to(ROOT)}"
        for file in files()
        if room_of(file) == room
        for other in imported(file)
        if room_of(other) in order and order[room_of(other)] > order[room]
    ]
    assert not up, "\n".join(sorted(up))


def test_no_files_import_each_other_in_a_circle() -> None:
    left = {file: imported(file) for file in files()}
    while free := [f for f, others in left.items() if not others & left.keys()]:
        for f in free:
            del left[f]
    circle = [
        f"{f.relative_to(ROOT)} -> {[str(o.relative_to(ROOT)) for o in others & left.keys()]}"
        for f, others in left.items()
    ]
    assert not circle, "\n".join(circle)
