"""Widths that a forward takes from other widths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import diffprune_fast as dpf
from diffprune_fast.slicing import SliceError
from diffprune_fast.tracing import probe


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


class Block(nn.Module):
    """The dims of ``query`` stay, as half of them are picked by position, and ``width`` follows those of ``value``."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.heads, self.head_dim = 2, 4

    def forward(self, x: Tensor) -> Tensor:
        q, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.query, self.value))
        q = torch.cat([q[..., 2:], q[..., :2]], -1)
        return x + self.out(nn.functional.scaled_dot_product_attention(q, q, v).transpose(1, 2).flatten(2))


class TwoKinds(nn.Module):
    """Six blocks and a layer at the end that reads no width from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(6)])
        self.inside, self.end = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.end(self.inside(x).relu())


def test_a_width_that_every_block_reads_from_elsewhere_is_found_in_all_of_them_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    walks: list[object] = []
    tried = probe._try

    def counted(*args: Any) -> Any:
        walks.append(None)
        return tried(*args)

    monkeypatch.setattr(probe, "_try", counted)
    plan = dpf.trace(TwoKinds(), (torch.zeros(2, 5, 8),), units="dims")
    stay = [n for n, why in plan.frozen.items() if "has a width that is read elsewhere" in why]
    assert {n for n in stay if "value.weight:0" in n} == {f"blocks.{i}.value.weight:0" for i in range(6)}
    assert "inside" in {g.name for g in plan.groups}
    assert len(walks) == 4  # the plan, the first block alone, the other blocks, the plan without them
