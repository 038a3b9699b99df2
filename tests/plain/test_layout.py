"""``layout="config"``: the best config of a class under a budget."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from models import small_condition_unet, small_unet, small_vae
from torch import nn
from zoo import ZOO

import diffprune_fast as dpf
from diffprune_fast.plain.layout import cheapest
from diffprune_fast.selection.budgets import BudgetError

BY_NAME = {case.name: case for case in ZOO}
QUICK: dict[str, Any] = {"criterion": "magnitude", "layout": "config"}


@pytest.mark.parametrize(
    "name",
    ["DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel-3", "FluxTransformer2DModel"],
)
def test_a_transformer_meets_the_budget_as_a_plain_config(name: str, tmp_path: Path) -> None:
    case = BY_NAME[name]
    torch.manual_seed(0)
    model = case.make().double().eval()
    result = dpf.score_and_prune(model, None, params=0.7, example_inputs=case.example_inputs, **QUICK)
    assert result.after.params <= 0.7 * result.before.params
    result.save_pretrained(tmp_path)
    own = type(model).from_pretrained(tmp_path, torch_dtype=torch.float64).eval()  # type: ignore[attr-defined]
    torch.testing.assert_close(case.run(own), case.run(model), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "budget"),
    [
        (small_unet, {"macs": 0.6}),
        (lambda: small_unet(attention_head_dim=None), {"macs": 0.4}),
        (small_condition_unet, {"params": 0.5}),
        (small_vae, {"macs": 0.5}),
        (lambda: small_unet(norm_num_groups=4, attention_head_dim=4), {"ratio": 0.3}),
    ],
)
def test_a_unet_or_autoencoder_meets_the_budget_as_a_plain_config(make: Any, budget: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make()
    result = dpf.score_and_prune(model, None, **budget, round_to=4, **QUICK)
    ((kind, share),) = budget.items()
    if kind != "ratio":
        assert getattr(result.after, kind) <= share * getattr(result.before, kind)
    result.save_pretrained(tmp_path)
    own = type(model).from_pretrained(tmp_path)
    assert dpf.trace(own).complexity() == result.after
    assert own.config.block_out_channels != list(make().config.block_out_channels)


def test_the_widths_go_where_they_damage_least() -> None:
    """Of two levels of about the same cost, the one whose channels the output needs stays."""

    def chosen(needed: int) -> tuple[int, ...]:
        torch.manual_seed(0)
        model = small_unet(down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3)
        plan = dpf.trace(model)
        damage = {True: 1.0, False: 1e-6}
        from diffprune_fast.plain.layout import Layout
        from diffprune_fast.scoring.scores import Scores

        size = 32 if needed == 0 else 64
        values = [damage[g.n_units == size] for g in plan.groups for _ in range(g.n_units)]
        import numpy as np

        scores = Scores(np.array(values), "none", "random", 0, damage=np.array(values))
        wish = Layout(model, {"macs": 0.6}, 1000, "count", round_to=8)
        wish.select(plan, scores)
        return wish.target.updates["block_out_channels"]

    assert chosen(0)[0] > chosen(1)[0]
    assert chosen(0)[1] < chosen(1)[1]


def test_the_search_is_as_good_as_trying_everything() -> None:
    values = ((8, 7, 6, 5, 4, 3, 2, 1), (9, 8, 7, 6, 5, 4, 3, 2, 1), (5, 4, 3, 2, 1))
    for weights in ((1.0, 1.0, 1.0), (9.0, 1.0, 2.0), (0.1, 3.0, 1.0)):

        def loss(v: tuple[int, ...], w: tuple[float, ...] = weights) -> float:
            return sum(x * (s[0] - n) ** 2 for x, s, n in zip(w, values, v))

        def cost(v: tuple[int, ...]) -> float:
            return float(v[0] * v[1] + v[1] * v[2] + v[0])

        best = min(loss(v) for v in product(*values) if cost(v) <= 40)
        found = cheapest(values, loss, cost, 40)
        assert found is not None
        assert loss(found) == pytest.approx(best)
    assert cheapest(values, loss, cost, 1) is None


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"macs": 0.001}, BudgetError, "can't be met by a config of UNet2DModel: .* gets down to"),
        ({"macs": 0.5, "ignore": ["conv_in*"]}, ValueError, "leave out ignore"),
        ({"macs": 0.5, "like": {"block_out_channels": (16, 48, 48)}}, ValueError, "leave out macs=0.5"),
    ],
)
def test_what_a_config_cannot_do_is_named(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        dpf.score_and_prune(small_unet(), None, **options, **QUICK)


def test_a_class_without_known_widths_is_sent_to_like() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    with pytest.raises(ValueError, match=r"layout='config' knows AutoencoderKL.* not Sequential: give like="):
        dpf.score_and_prune(model, None, macs=0.5, example_inputs=(torch.zeros(1, 4),), **QUICK)
