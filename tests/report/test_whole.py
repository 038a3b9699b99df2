"""Why channels stayed: counted by reason, and on the page."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from diffprune_fast import score_and_prune, trace
from diffprune_fast.report import kept_whole
from diffprune_fast.report.whole import FULL


class Sorted(nn.Module):
    """Channels that are sorted have no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 16), nn.Linear(16, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(x).sort(dim=-1).values).relu())


X = (torch.zeros(1, 4),)


@pytest.fixture(scope="module")
def plan():
    return trace(Sorted(), X)


def test_a_reason_has_its_places_and_the_most_channels_come_first(plan):
    found = kept_whole(plan)
    assert "sort" in found[0].reason
    assert (found[0].places, found[0].channels) == (2, 32)
    assert found[0].examples == ("first.weight (outputs)", "first.bias (outputs)")
    assert any("output of the model" in why.reason for why in found)
    assert [why.channels for why in found] == sorted([why.channels for why in found], reverse=True)


def test_groups_of_which_nothing_went_are_told_apart(plan):
    (group,) = plan.groups
    whole = kept_whole(plan, {group.name: np.arange(8)})[-1]
    assert (whole.reason, whole.places, whole.channels, whole.examples) == (FULL, 1, 8, (group.name,))
    assert FULL not in [why.reason for why in kept_whole(plan, {group.name: np.arange(7)})]


def test_the_same_reason_in_several_modules_is_one_line_and_kernels_are_no_channels():
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    found = kept_whole(trace(UNet2DModel(8, block_out_channels=(8, 16), norm_num_groups=4, **blocks)))
    assert len({why.reason for why in found}) == len(found)
    assert not [why for why in found if "dim 2" in str(why.examples)]
    assert {why.examples[0]: why.channels for why in found}["conv_in.weight (inputs)"] == 3


def test_the_page_has_them(tmp_path):
    page = score_and_prune(Sorted(), None, criterion="magnitude", ratio=0.5, example_inputs=X, round_to=1)
    text = page.report(tmp_path / "page.html").read_text()
    table = text.split("What stayed whole, and why", 1)[1].split("</table>", 1)[0]
    assert "sort" in table
    assert "first.weight (outputs), first.bias (outputs)" in table
