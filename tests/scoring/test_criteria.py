"""Every criterion: chosen by its name, described in the docs, and its formula from weights and gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from scoring_models import by_hand, gradients, images, tiny, tiny_plan, weights
from torch import Tensor, nn

from diffprune_fast import ops
from diffprune_fast.choices import CriterionName, VariantName
from diffprune_fast.scoring import CRITERIA, VARIANTS, score

METHOD = Path(__file__).parents[2] / "docs" / "method.md"
Tensors = dict[str, Tensor]

# What a unit's score is, of the loss's gradient over all samples; the sum over a unit is ``by_hand``.
FORMULAS: dict[str, Callable[[Any, Tensors, Tensors], np.ndarray]] = {
    "diff-pruning": lambda plan, theta, g: by_hand(plan, {n: (theta[n] * g[n]).abs() for n in theta}),
    "taylor": lambda plan, theta, g: np.abs(by_hand(plan, {n: theta[n] * g[n] for n in theta})),
    "fisher": lambda plan, theta, g: by_hand(plan, {n: (theta[n] * g[n]) ** 2 for n in theta}),
    "magnitude": lambda plan, theta, g: np.sqrt(by_hand(plan, {n: theta[n] ** 2 for n in theta})),
}
WITHOUT_FORMULA = {"random"}


def square(model: nn.Module, batch: Any, t: Tensor, noise: Tensor) -> Tensor:
    return model(batch, torch.zeros_like(t)).square().mean()


@pytest.mark.parametrize("name", [name for name in CRITERIA if name not in WITHOUT_FORMULA])
def test_a_criterion_is_its_formula(name: str) -> None:
    model = tiny()
    plan, batch = tiny_plan(model), images(4)
    samples = {"micro_batch": 4, "min_samples": 4, "max_samples": 4, "timesteps": [0]}
    found = score(model, [batch], plan, criterion=name, loss_fn=square, progress=False, **samples)  # type: ignore[arg-type]
    gradient = gradients(model, square(model, batch, torch.zeros(4), batch))
    np.testing.assert_allclose(found.values, FORMULAS[name](plan, weights(model), gradient), rtol=1e-9)


def test_the_names_to_choose_from_are_those_of_the_tables() -> None:
    assert set(get_args(CriterionName)) == CRITERIA.keys()
    assert set(get_args(VariantName)) == VARIANTS.keys()


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_sums_what_the_kernels_can(name: str) -> None:
    assert CRITERIA[name].element in (None, *ops.CRITERIA)


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_is_described(name: str) -> None:
    assert f'`"{name}"`' in METHOD.read_text(encoding="utf-8")
