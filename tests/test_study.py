"""The study's results: lines of a file, and the tables that are made of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "study" / "study.py"


def row(criterion: str, seed: int, stage: str, **figures: float) -> dict[str, Any]:
    case = {"model": "dit", "criterion": criterion, "allocation": "mean", "budget": 0.5, "seed": seed}
    return {**case, "variant": "plain", "stage": stage, "measure": "loss", "params": 1_250_000, **figures}


def damage(cluster: str, damage: float, good: float, bad: float) -> dict[str, Any]:
    scores = {"good": good, "bad": bad}
    return {"model": "dit", "measure": "damage", "cluster": cluster, "damage": damage, "scores": scores}


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What ``--table`` makes of a few lines."""
    pytest.importorskip("sklearn")
    out = tmp_path_factory.mktemp("study")
    rows = [
        row("micro", 0, "sliced", loss=0.11),
        row("micro", 1, "sliced", loss=0.13),
        row("random", 0, "sliced", loss=0.2),
        row("random", 0, "compensated", loss=0.05),
        {**row("magnitude", 0, "sliced"), "why": "out of reach"},
        {**row("dense", 0, "dense", loss=0.04), "model": "photos", "budget": 1.0},
        {**row("micro", 0, "sliced", loss=0.08), "model": "photos"},
        {**row("random", 0, "sliced", loss=0.07), "model": "photos"},
        damage("a", 1.0, 2.0, 3.0),
        damage("b", 2.0, 4.0, 2.0),
        damage("c", 3.0, 9.0, 1.0),
    ]
    (out / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--table"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_table_has_mean_and_range_of_the_seeds_and_marks_the_best(printed: list[str]) -> None:
    assert "| mean | micro | **0.1200** (0.1100–0.1300) |  | 1.25M | 2 |" in printed
    assert "| mean | random | 0.2000 | 0.0500 | 1.25M | 1 |" in printed  # alone in its column


def test_losses_are_also_multiples_of_the_dense_models(printed: list[str]) -> None:
    assert any("| 0.0800 ×2.00 |" in line for line in printed)


def test_a_budget_out_of_reach_has_no_line(printed: list[str]) -> None:
    assert not any("magnitude" in line for line in printed)


def test_scores_are_ranked_against_the_measured_damage(printed: list[str]) -> None:
    assert "| good | 1.00 |  |" in printed
    assert "| bad | -1.00 |  |" in printed
