"""What single clusters cost: against models whose answer is known, and against pruning and compensating by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from processes import run_ranks
from torch import Tensor, nn

import diffprune_fast as dpf
from diffprune_fast.plan.keep_sets import sliced_shapes
from diffprune_fast.scoring import Scores
from diffprune_fast.sensitivity import measure, measure_sensitivities

QUICK: dict[str, Any] = {"macs": 0.6, "round_to": 4, "max_samples": 32, "progress": False}


class Halves(nn.Module):
    """Two groups of 16: the first is linear in four inputs, so that any four of its units say all; the second isn't."""

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.spare_out = nn.Linear(4, 16), nn.Linear(16, 4)
        self.needed, self.needed_out = nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.spare_out(self.spare(x)) + self.needed_out(torch.relu(4 * self.needed(x)))


def loss_fn(model: nn.Module, batch: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    return (model(batch) - noise).square().mean(1)


def halves() -> tuple[nn.Module, dpf.Plan, Scores, list[Tensor]]:
    torch.manual_seed(0)
    model = Halves()
    plan = dpf.trace(model, (torch.zeros(1, 4),))
    scores = Scores(np.random.default_rng(0).random(plan.n_units), "micro", "diff-pruning", 0)
    return model, plan, scores, [torch.randn(256, 4, generator=torch.Generator().manual_seed(1))]


def unet() -> UNet2DModel:
    torch.manual_seed(0)
    types = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return UNet2DModel(8, 3, 3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, **types).eval()


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(32, 3, 8, 8, generator=generator) * 2 - 1 for _ in range(4)]


def measured(model: nn.Module, plan: dpf.Plan, scores: Scores, loader: Any, **options: Any) -> Any:
    options = {"loss_fn": loss_fn, "round_to": 1, "progress": False, **options}
    found = measure_sensitivities(model, loader, plan, scores, **options).sensitivities
    assert found is not None
    return found


def test_units_that_others_make_up_for_cost_nothing_and_others_do() -> None:
    model, plan, scores, loader = halves()
    found = measured(model, plan, scores, loader)
    spare, needed = plan.position["spare"], plan.position["needed"]
    some = found.shares[spare] <= 0.75
    assert some.sum() >= 2
    assert (found.damage[spare][some] < 1e-3 * found.damage[needed][0]).all()
    assert (np.diff(found.damage[needed]) > 0).all()


def test_shares_are_those_of_the_units_that_went() -> None:
    model, plan, scores, loader = halves()
    found = measured(model, plan, scores, loader)
    assert np.abs(found.shares - np.array(measure.SHARES)).max() <= 0.5 / 16
    coarse = measured(model, plan, scores, loader, round_to=8)
    assert coarse.shares[:, 0].tolist() == [0.5, 0.5]
    assert np.isnan(coarse.shares[:, 1:]).all()


def test_the_damage_is_that_of_pruning_and_compensating_by_hand() -> None:
    model, plan, scores, loader = halves()
    teacher = copy.deepcopy(model)

    def distance(model: nn.Module, batch: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return (model(batch) - teacher(batch)).square().mean(1)

    found = measured(model, plan, scores, loader, loss_fn=distance)
    needed = plan.position["needed"]
    lowest = np.argsort(scores.of(plan, "needed"))[: round(found.shares[needed][1] * 16)]
    keep = {"needed": np.setdiff1d(np.arange(16), lowest)}
    pruned = dpf.prune(model, plan, keep, inplace=False, example_inputs=(torch.zeros(1, 4),)).model
    kept = sliced_shapes(model, plan, keep).kept
    how: dict[str, Any] = {"loss_fn": distance, "samples": measure.SAMPLES, "progress": False}
    assert dpf.compensate(pruned, model, loader, kept=kept, **how).helped
    seen = loader[0][measure.SAMPLES : measure.SAMPLES + measure.HELD_BACK]
    with torch.no_grad():
        by_hand = float((pruned(seen) - model(seen)).square().mean())
    assert found.damage[needed][1] == pytest.approx(by_hand, rel=1e-3)


def test_groups_to_ignore_are_not_tried() -> None:
    model, plan, scores, loader = halves()
    found = measured(model, plan, scores, loader, ignore=["spare"])
    assert np.isnan(found.damage[plan.position["spare"]]).all()
    assert np.isfinite(found.damage[plan.position["needed"]]).all()


def test_images_are_asked_for() -> None:
    model, plan, scores, _ = halves()
    with pytest.raises(ValueError, match="give a loader"):
        measured(model, plan, scores, None)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_stays_as_it_is(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan, scores, loader = halves()
    held, before = dict(model.named_parameters()), {n: t.clone() for n, t in model.state_dict().items()}
    measured(model, plan, scores, loader)

    def fail(*args: object, **kwargs: object) -> None:
        raise error("in the middle")

    monkeypatch.setattr(measure, "Solver", fail)
    with pytest.raises(error, match="in the middle"):
        measured(model, plan, scores, loader)
    assert all(p is held[n] for n, p in model.named_parameters())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.training


def test_the_method_shares_its_budget_by_what_it_measured() -> None:
    model = unet()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    result = dpf.score_and_prune(model, images(), allocation="measured", inplace=False, **QUICK)
    assert result.selection is not None
    assert result.selection.allocation == "measured"
    assert result.scores is not None
    assert result.scores.sensitivities is not None
    assert result.scores.damage is not None
    assert "measure" in result.seconds
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_the_method_refuses_a_loss_of_ones_own_without_images() -> None:
    with pytest.raises(ValueError, match="give a loader"):
        dpf.score_and_prune(
            Halves(),
            None,
            criterion="magnitude",
            allocation="measured",
            loss_fn=loss_fn,
            macs=0.5,
            example_inputs=(torch.zeros(1, 4),),
            progress=False,
        )


def rank_main(rank: int, ranks: int, path: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
    try:
        found = measured(*halves())
        torch.save(torch.from_numpy(found.damage), f"{path}-{rank}")
    finally:
        torch.distributed.destroy_process_group()


def test_ranks_share_the_samples_and_end_with_one_process_numbers(tmp_path: Path) -> None:
    run_ranks(rank_main, 2, str(tmp_path / "store"))
    alone = measured(*halves()).damage
    for rank in range(2):
        found = torch.load(tmp_path / f"store-{rank}", weights_only=True).numpy()
        np.testing.assert_allclose(found, alone, rtol=1e-3, atol=1e-6 * np.nanmax(alone))
