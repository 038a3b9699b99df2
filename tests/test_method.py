"""score_and_prune as its users call it, and what it does with wrong input."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from models import small_unet
from torch import nn

import diffprune_fast as dpf

WHOLE: dict[str, Any] = {"micro_batch": 2, "min_samples": 32, "max_samples": 32, "progress": False}
# What compensation does is in test_compensated_method.py; it takes half of the time.
QUICK: dict[str, Any] = {**WHOLE, "compensate": False}


def images(n: int = 8, channels: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(4, channels, 16, 16, generator=generator) * 2 - 1 for _ in range(n // 4)]


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return small_unet(
        block_out_channels=(16, 32),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    after = model.state_dict()
    return list(after) == list(before) and all(
        torch.equal(
            after[n],
            t,
        )
        or t.isnan().any()
        for n, t in before.items()
    )


def test_nothing_but_a_model_and_a_loader() -> None:
    model = tiny()
    before = sum(p.numel() for p in model.parameters())
    result = dpf.score_and_prune(model, images(), **WHOLE)
    assert result.model is model
    assert result.before.params == before
    assert result.after.params == sum(p.numel() for p in model.parameters()) < 0.85 * before
    assert model(torch.randn(1, 3, 16, 16), 10).sample.shape == (1, 3, 16, 16)
    assert "split-half agreement" in str(result)


@pytest.mark.parametrize("kind", ["params", "macs"])
def test_budget_is_met_from_below(kind: str) -> None:
    result = dpf.score_and_prune(tiny(), images(), **{kind: 0.5}, round_to=1, **QUICK)
    share = getattr(result.after, kind) / getattr(result.before, kind)
    assert 0.35 < share <= 0.5


def test_result_counts_what_the_model_is() -> None:
    result = dpf.score_and_prune(tiny(), images(), macs=0.6, **QUICK)
    again = dpf.trace(result.model)
    assert (again.params(), again.macs()) == (result.after.params, result.after.macs)


def test_copy_leaves_the_model_alone() -> None:
    model = tiny()
    before = state(model)
    result = dpf.score_and_prune(model, images(), inplace=False, **QUICK)
    assert result.model is not model
    assert unchanged(model, before)
    assert sum(p.numel() for p in result.model.parameters()) == result.after.params


def test_same_seed_same_keep_set() -> None:
    keeps = [dpf.score_and_prune(tiny(), images(), seed=3, **QUICK).keep for _ in range(2)]
    assert all((keeps[0][n] == keeps[1][n]).all() for n in keeps[0])


def test_gradients_modes_and_frozen_weights_survive() -> None:
    model = tiny().train()
    model.conv_in.weight.requires_grad_(False)
    model(torch.randn(1, 3, 16, 16), 10).sample.square().mean().backward()
    gradient = model.down_blocks[0].resnets[0].conv1.weight.grad.clone()
    identity = {n: id(p) for n, p in model.named_parameters()}
    result = dpf.score_and_prune(model, images(), **WHOLE)
    assert model.training
    assert model.down_blocks[0].training
    assert not model.conv_in.weight.requires_grad
    assert {n: id(p) for n, p in model.named_parameters()} == identity
    rows = result.keep["down_blocks.0.resnets.0.conv1"]
    columns = result.keep["conv_in"]
    assert torch.equal(model.down_blocks[0].resnets[0].conv1.weight.grad, gradient[rows][:, columns])


def test_optimizer_goes_on_after_pruning() -> None:
    model = tiny()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(1, 3, 16, 16), 10).sample.square().mean().backward()
        optimizer.step()
    moment = optimizer.state[model.conv_in.weight]["exp_avg"].clone()
    result = dpf.score_and_prune(model, images(), optimizer=optimizer, **WHOLE)
    assert torch.equal(optimizer.state[model.conv_in.weight]["exp_avg"], moment[result.keep["conv_in"]])
    optimizer.zero_grad()
    model(torch.randn(1, 3, 16, 16), 10).sample.square().mean().backward()
    optimizer.step()
    assert torch.isfinite(model.conv_in.weight).all()


@pytest.mark.parametrize("wrong", ["Adafactor", "copy", "other"])
def test_an_optimizer_that_cannot_follow_is_refused_before_scoring(wrong: str) -> None:
    model = tiny()
    optimizer: Any = torch.optim.Adafactor(model.parameters())
    model(torch.randn(1, 3, 16, 16), 10).sample.square().mean().backward()
    optimizer.step()
    if wrong == "other":
        optimizer = torch.optim.SGD(tiny().parameters(), lr=0.1)
    drawn: list[int] = []

    class Loader:
        def __iter__(self) -> Any:
            drawn.append(1)
            return iter(images())

    before = state(model)
    with pytest.raises(dpf.slicing.SliceError, match={"copy": "inplace=False"}.get(wrong, "optimizer")):
        dpf.score_and_prune(model, Loader(), optimizer=optimizer, inplace=wrong != "copy", **QUICK)
    assert not drawn
    assert unchanged(model, before)


def test_gradient_of_pruned_model_is_that_of_its_loss() -> None:
    """A pruned model trains: its gradients agree with finite differences."""
    model = dpf.score_and_prune(tiny(), images(), **QUICK).model.double()
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    w = model.conv_in.weight
    model(x, 10).sample.square().sum().backward()
    with torch.no_grad():
        step = torch.zeros_like(w)
        step[0, 0, 1, 1] = 1e-6
        w += step
        up = model(x, 10).sample.square().sum()
        w -= 2 * step
        down = model(x, 10).sample.square().sum()
    assert w.grad[0, 0, 1, 1].item() == pytest.approx((up - down).item() / 2e-6, rel=1e-4)


WRONG = {
    "ratio 0": ({"ratio": 0.0}, ValueError, "ratio"),
    "ratio 1": ({"ratio": 1.0}, ValueError, "ratio"),
    "ratio 1.5": ({"ratio": 1.5}, ValueError, "ratio"),
    "negative ratio": ({"ratio": -0.3}, ValueError, "ratio"),
    "two budgets": ({"ratio": 0.3, "macs": 0.5}, ValueError, "one budget"),
    "unknown budget": ({"flops": 0.5}, TypeError, "unknown option 'flops'"),
    "typing mistake": ({"rankings": "global"}, TypeError, "did you mean 'ranking'"),
    "out of reach": ({"macs": 1e-6}, ValueError, "can't be met"),
    "more than the whole": ({"macs": 1.5}, ValueError, r"macs=1.5 \(a number of MACs, as it is above 1\) can't be met"),
    "unknown estimator": ({"estimator": "exact"}, ValueError, "estimator"),
    "unknown mode": ({"norm_groups": "some"}, ValueError, "norm_groups"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_option_is_one_clear_error_and_the_model_untouched(name: str) -> None:
    options, error, words = WRONG[name]
    model = tiny()
    before = state(model)
    with pytest.raises(error, match=words):
        dpf.score_and_prune(model, images(), **{**QUICK, **options})
    assert unchanged(model, before)


def test_a_compiled_model_is_the_one_inside() -> None:
    model = tiny()
    result = dpf.score_and_prune(torch.compile(model), images(), **QUICK)
    assert result.model is model
    assert result.after.params == sum(p.numel() for p in model.parameters()) < result.before.params


def test_what_is_no_model_or_no_call_is_said() -> None:
    with pytest.raises(TypeError, match=r"the model is a str: give a torch.nn.Module or a diffusers pipeline"):
        dpf.score_and_prune("path/to/model", images())
    with pytest.raises(TypeError, match=r"example_inputs is a list: give a tuple"):
        dpf.score_and_prune(tiny(), images(), example_inputs=[torch.zeros(1, 3, 16, 16), torch.tensor([1])])  # type: ignore[arg-type]


class WithExtra(nn.Module):
    """An input that may be left out, and a number that isn't used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.extra = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 3, 3, 1, 1), nn.Linear(5, 16)
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, extra: torch.Tensor | None = None) -> torch.Tensor:
        h = self.first(x)
        return self.last(h if extra is None else h + self.extra(extra)[:, :, None, None])


def test_parameters_that_the_example_call_does_not_reach_are_named() -> None:
    x, extra = torch.zeros(1, 3, 8, 8), torch.zeros(1, 5)
    without = dpf.score_and_prune(WithExtra(), None, criterion="magnitude", example_inputs=(x,))
    assert "note:   2 parameters were not reached by the example call (extra.weight, extra.bias)" in str(without)
    assert without.model.extra.out_features == 16
    given = dpf.score_and_prune(WithExtra(), None, criterion="magnitude", example_inputs=(x, extra))
    assert "not reached" not in str(given)
    assert given.model(x, extra).shape == x.shape


LOADERS: dict[str, tuple[Any, str]] = {
    "wrong channel count": (images(channels=1), "channel"),
    "empty": ([], "empty|no batch"),
    "images from 0 to 255": ([(images()[0] + 1) * 127.5], r"trained on \[-1, 1\]"),
    "NaN images": ([torch.full((4, 3, 16, 16), math.nan)], "NaN|finite"),
}


@pytest.mark.parametrize("name", LOADERS)
def test_wrong_loader_is_one_clear_error_and_the_model_untouched(name: str) -> None:
    loader, words = LOADERS[name]
    model = tiny()
    before = state(model)
    with pytest.raises(ValueError, match=words):
        dpf.score_and_prune(model, loader, **QUICK)
    assert unchanged(model, before)


def test_nan_in_the_weights_names_the_parameter() -> None:
    model = tiny()
    with torch.no_grad():
        model.conv_out.weight[0, 0, 0, 0] = math.nan
    before = copy.deepcopy(state(model))
    with pytest.raises(ValueError, match=r"conv_out\.weight"):
        dpf.score_and_prune(model, images(), **QUICK)
    assert unchanged(model, before)
