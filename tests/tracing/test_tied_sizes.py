"""Widths that a forward takes from other widths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import diffprune_fast as dpf
from diffprune_fast.slicing import SliceError


class Tied(nn.Module):
    """The channels of ``text`` are viewed by the width of ``image``."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = nn.Linear(6, 8), nn.Linear(6, 8)
        self.out, self.end = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        text, image = self.text(x).relu(), self.image(x).sigmoid()
        return self.out(text.view(x.shape[0], -1, image.shape[-1])).sum(1) + self.end(image)


def test_the_error_of_a_tied_size_names_the_operation_that_reads_it() -> None:
    model, inputs = Tied(), (torch.zeros(2, 6),)
    plan = dpf.trace(model, inputs)
    with pytest.raises(
        SliceError,
        match=r"^the keep-set can't be sliced: size at model \(view\): row 0 keeps 4 channels and row 1 keeps 8; "
        "all rows must keep equally many$",
    ):
        dpf.prune(model, plan, {"text": np.arange(4)}, example_inputs=inputs)
