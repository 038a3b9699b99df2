"""The small examples, in short: they prune to the budget they name, and leave their picture."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / name / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "ways"),
    [
        ("gan", ["adversarial", "sensitivity", "magnitude", "random"]),
        ("vae", ["its loss", "magnitude", "random"]),
    ],
)
def test_the_example_prunes_in_every_way_and_shows_it(
    name: str, ways: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    loaded(name).main(tmp_path, True)
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [row[0] for row in rows] == ["(as trained)", *ways]
    macs = [float(row[2].removesuffix("M")) for row in rows]
    assert all(0.35 * macs[0] < m <= 0.505 * macs[0] for m in macs[1:])  # printed to a tenth
    assert all(cell for row in rows[1:] for cell in row)
    assert (tmp_path / "samples.png").stat().st_size > 1000
