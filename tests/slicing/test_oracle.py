"""Whole models: the sliced model equals the masked dense model, in float64 to 1e-9."""

from __future__ import annotations

import pytest
import torch
from models import CASES, Case
from oracle import assert_exact


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize(("norm_groups", "seed", "ratio"), [("exact", 0, 0.25), ("count", 1, 0.5)])
def test_oracle_sliced_model_equals_masked_dense_model(case: Case, norm_groups: str, seed: int, ratio: float) -> None:
    torch.manual_seed(0)
    assert_exact(
        case.make(), case.run, ratio=ratio, seed=seed, norm_groups=norm_groups, example_inputs=case.example_inputs
    )
