"""The notebook's cells run from top to bottom, with less of everything."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "digits"
FEWER = {"max_samples": 32, "sampling_steps": 2, "finetune_steps": 2}


def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("sklearn", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.chdir(FOLDER)
    monkeypatch.syspath_prepend(str(FOLDER))
    data = importlib.import_module("data")
    train, held_out = data.digits()
    few = dataclasses.replace(held_out, images=held_out.images[:32], labels=held_out.labels[:32])
    monkeypatch.setattr(data, "digits", lambda: (train, few))
    cells = json.loads((FOLDER / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {}
    for i, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {i}", "exec"), names)
            if "parameters" in cell["metadata"].get("tags", ()):
                assert names.keys() >= FEWER.keys()
                names |= FEWER
    assert 0.4 < names["result"].after.macs / names["result"].before.macs < 0.505
    assert "M parameters" in capsys.readouterr().out.splitlines()[-1]
