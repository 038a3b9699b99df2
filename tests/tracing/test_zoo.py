"""Every architecture of the zoo: the sliced model equals the masked dense model, in float64 to 1e-9."""

from __future__ import annotations

import pytest
import torch
from models import Case
from oracle import randomised
from oracle_zoo import EXACT, compare
from zoo import MORE, TRANSFORMERS, ZOO

import diffprune_fast as dpf

RUNS = [
    *[pytest.param(case, run, id=f"{case.name}-{run}") for case in ZOO for run in ("exact", "uneven", "heads")],
    *[pytest.param(case, "uneven", id=f"{case.name}-uneven") for case in [*MORE, *TRANSFORMERS]],
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")  # Mochi asks for float32
@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")  # PyTorch, of hooks on all modules
@pytest.mark.parametrize(("case", "run"), RUNS)
def test_oracle_sliced_zoo_model_equals_masked_dense_model(case: Case, run: str) -> None:
    torch.manual_seed(0)
    plan = dpf.trace(randomised(case.make()), case.example_inputs, units="heads" if run == "heads" else "auto")
    error, left = compare(case, plan, 0.3, 0, run)
    assert error <= EXACT, f"sliced and masked model differ by {error:.2e} of the output's scale"
    assert left < 0.95
