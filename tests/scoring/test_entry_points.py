"""Criteria of other packages, by their entry points."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import diffprune_fast as dpf

MODULE = """
import numpy as np
from diffprune_fast.scoring.criteria import Criterion

def descending(model, plan):
    return -np.arange(plan.n_units)

def too_few(model, plan):
    return [1.0]

squares = Criterion("square")
nothing = 3
"""
POINTS = """[diffprune_fast.criteria]
descending = somebodys_criteria:descending
too-few = somebodys_criteria:too_few
squares = somebodys_criteria:squares
nothing = somebodys_criteria:nothing
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A model, beside an installed package with criteria."""
    (tmp_path / "somebodys_criteria.py").write_text(MODULE)
    info = tmp_path / "somebodys_criteria-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys-criteria\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


def scored(model: nn.Module, criterion: str, **options: object) -> dpf.Scores:
    plan = dpf.trace(model, (torch.zeros(1, 4),))
    return dpf.score(model, None, plan, criterion=criterion, progress=False, **options)


def test_a_function_of_weights(model: nn.Module) -> None:
    scores = scored(model, "descending")
    np.testing.assert_array_equal(scores.values, -np.arange(8.0))
    assert scores.criterion == "descending"


def test_a_criterion_of_gradients_is_the_kernels_sum(model: nn.Module) -> None:
    plan = dpf.trace(model, (torch.zeros(1, 4),))
    images = [torch.linspace(-1, 1, 64).reshape(16, 4)]

    def loss(model: nn.Module, batch: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return (model(batch + noise) - noise).square().mean(1)

    values = [
        dpf.score(
            model, images, plan, criterion=name, loss_fn=loss, max_samples=32, progress=False, damage=False
        ).values
        for name in ("squares", "fisher")
    ]
    np.testing.assert_array_equal(*values)


@pytest.mark.parametrize(("name", "error", "message"), [
    ("unheard-of", ValueError, "choose one of 'diff-pruning', .*, 'descending', 'nothing'"),
    ("nothing", TypeError, "'nothing' .* is neither a Criterion nor a function: 3"),
    ("too-few", ValueError, r"the criterion gave \(1,\) scores, the plan has 8 units"),
])  # fmt: skip
def test_what_is_no_criterion_is_refused(model: nn.Module, name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        scored(model, name)
