"""Every architecture: the sliced model equals the masked dense model, in float64 to 1e-9, and its row is true."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from documented import PAGE, writer
from models import CASES
from oracle import randomised
from oracle_zoo import EXACT, compare
from torch import nn
from zoo import MORE, TRANSFORMERS, ZOO
from zoo_image_transformers import IMAGE_TRANSFORMERS
from zoo_language import LANGUAGE_CASES
from zoo_video_transformers import VIDEO_TRANSFORMERS

import diffprune_fast as dpf
from diffprune_fast.choices import Units

ALL = {case.name: case for case in [*CASES, *ZOO, *MORE, *TRANSFORMERS]}
WITHOUT_GROUP_NORMS = [
    case
    for case in [*IMAGE_TRANSFORMERS, *VIDEO_TRANSFORMERS, *LANGUAGE_CASES]
    if not case.name.startswith("Transformer2DModel")
]
PAIRS = {
    **{case.name: ("row",) for case in CASES},  # tests/slicing/test_oracle.py has their keep-sets
    **{case.name: ("row", "exact", "uneven", "heads") for case in ZOO},
    # Without a GroupNorm "exact" and "count" are the same, and even keep-sets show less.
    **{case.name: ("row", "uneven", "heads") for case in WITHOUT_GROUP_NORMS},
    # The heads of AutoencoderDC span several groups of a convolution.
    **{c.name: ("row", "uneven", *["heads"] * c.name.startswith("AutoencoderDC")) for c in [*MORE, *TRANSFORMERS]},
}
# Those of one architecture follow each other, as most go by the same plan.
RUNS = [pytest.param(name, run, id=f"{name}-{run}") for name, runs in PAIRS.items() for run in runs]


@lru_cache(maxsize=1)
def traced(name: str, units: Units) -> tuple[nn.Module, dpf.Plan]:
    torch.manual_seed(0)
    model = randomised(ALL[name].make())
    return model, dpf.trace(model, ALL[name].example_inputs, units=units)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")  # Mochi asks for float32
@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")  # PyTorch, of hooks on all modules
@pytest.mark.parametrize(("name", "run"), RUNS)
def test_oracle_of_the_zoo(name: str, run: str) -> None:
    """A "row" is the page's; the other runs are of keep-sets: the sliced model equals the masked dense model."""
    model, plan = traced(name, "heads" if run == "heads" else "auto")
    if run == "row":
        row = writer.Row(name, trace_seconds=0.0)
        writer.describe(row, plan, 0.3)
        written = writer.without_times(PAGE.read_text(encoding="utf-8")).splitlines()
        assert writer.without_times(writer.line_of(row)) in written, f"run {writer.__file__} --write {PAGE}"
        return
    error, left = compare(ALL[name], model, plan, 0.3, 0, run)
    assert error <= EXACT, f"sliced and masked model differ by {error:.2e} of the output's scale"
    assert left < 0.95
