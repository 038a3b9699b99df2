"""FusedImportance gives what Torch-Pruning's importances give, from one pass over the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_pruning as tp
from pruned_by_tp import CASES
from torch import Tensor, nn

from diffprune_fast.integrations.torch_pruning import FusedImportance, sums

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

Taylor, Magnitude = tp.importance.GroupTaylorImportance, tp.importance.GroupMagnitudeImportance
ALL = [*tp.importance.GroupMagnitudeImportance().target_types, nn.GroupNorm]


def same(ours: Tensor | None, theirs: Tensor | None, tolerance: float = 1e-5) -> None:
    assert (ours is None) == (theirs is None)
    if ours is not None and theirs is not None:
        assert ours.shape == theirs.shape
        scale = theirs.abs().max().item()
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=tolerance * scale), (ours - theirs).abs().max() / scale


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("ours", "theirs"), [
    (lambda: FusedImportance("diff-pruning"), lambda: Taylor()),
    (lambda: FusedImportance("taylor"), lambda: Taylor(multivariable=True)),
    (lambda: FusedImportance("magnitude"), lambda: Magnitude()),
    (lambda: FusedImportance("magnitude", p=1), lambda: Magnitude(p=1)),
    (lambda: FusedImportance("diff-pruning", bias=True, target_types=ALL), lambda: Taylor(bias=True, target_types=ALL)),
    (lambda: FusedImportance("magnitude", bias=True, target_types=ALL), lambda: Magnitude(bias=True, target_types=ALL)),
], ids=["abs", "multivariable", "l2", "l1", "abs-bias-norms", "l2-bias-norms"])  # fmt: skip
def test_importances_of_every_group(case: str, ours: Any, theirs: Any) -> None:
    groups = CASES[case].groups(*CASES[case].make())
    assert groups
    mine, own = ours(), theirs()
    for group in groups:
        same(mine(group), own(group))


@pytest.mark.parametrize("reduction", ["sum", "mean", "max", "prod", "first", "gate", None])
@pytest.mark.parametrize(("criterion", "multivariable"), [("diff-pruning", False), ("taylor", True)])
def test_reductions(reduction: str | None, criterion: str, multivariable: bool) -> None:
    groups = CASES["normed"].groups(*CASES["normed"].make())
    ours = FusedImportance(criterion, group_reduction=reduction, normalizer=None)
    theirs = Taylor(group_reduction=reduction, normalizer=None, multivariable=multivariable)
    for group in groups:
        same(ours(group), theirs(group))


@pytest.mark.parametrize("normalizer", [None, "sum", "standarization", "mean", "max", "gaussian", "lamp", torch.sqrt])
def test_normalizers(normalizer: Any) -> None:
    groups = CASES["residual"].groups(*CASES["residual"].make())
    ours, theirs = FusedImportance("magnitude", normalizer=normalizer), Magnitude(normalizer=normalizer)
    for group in groups:
        same(ours(group), theirs(group))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model, inputs = CASES["residual"].make(dtype)
    groups = CASES["residual"].groups(model, inputs.to(dtype))
    ours, theirs = FusedImportance(), Taylor()
    for group in groups:
        same(ours(group), theirs(group), 2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_one_pass_serves_all_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    importance = FusedImportance()
    for group in CASES["unet"].groups(*CASES["unet"].make()):
        importance(group)
    assert len(calls) == 1


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls, real = [], sums.channel_scores_

    def run(scores: Tensor, thetas: Any, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(len(thetas))
        return real(scores, thetas, *args, **kwargs)

    monkeypatch.setattr(sums, "channel_scores_", run)
    return calls


def test_a_group_that_is_asked_for_again_is_read_again() -> None:
    model, inputs = CASES["residual"].make()
    group = CASES["residual"].groups(model, inputs)[0]
    importance = FusedImportance(normalizer=None)
    before = importance(group)
    for p in model.parameters():
        p.data.mul_(2)  # no version counter shows this
    same(importance(group), 2 * before)


def test_a_weight_that_was_written_to_is_read_again() -> None:
    model, inputs = CASES["residual"].make()
    first, *others = CASES["residual"].groups(model, inputs)
    importance = FusedImportance(normalizer=None)
    importance(first)
    with torch.no_grad():
        model.head.weight.mul_(3)
        model.joined.weight.grad.mul_(5)
    for group in others:
        same(importance(group), Taylor(normalizer=None)(group))


def test_only_what_was_sliced_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = CASES["residual"].make()
    graph = CASES["residual"].graph(model, inputs)
    importance, n = FusedImportance(normalizer=None), len(list(model.parameters()))
    calls = counted(monkeypatch)
    for group in graph.get_all_groups(ignored_layers=[model.head]):
        same(importance(group), Taylor(normalizer=None)(group))
        group.prune(idxs=[0, 1])
    assert calls[0] == n
    assert len(calls) > 1
    assert max(calls[1:]) < n / 2


def test_norms_all_counts_the_weights_of_every_norm() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    graph = tp.DependencyGraph().build_dependency(model.eval(), torch.ones(1, 3, 4, 4))
    group = graph.get_pruning_group(model[0], tp.prune_conv_out_channels, [0, 1, 2, 3])
    plain = FusedImportance(group_reduction="sum", normalizer=None)(group)
    every = FusedImportance(group_reduction="sum", normalizer=None, norms="all")(group)
    same(every - plain, model[1].weight.detach().abs() + model[2].weight.detach().abs())


def test_accumulated_sums_take_the_absolute_value_per_micro_batch() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    graph = tp.DependencyGraph().build_dependency(model, torch.ones(1, 3))
    group = graph.get_pruning_group(model[0], tp.prune_linear_out_channels, [0, 1, 2, 3])
    importance = FusedImportance(group_reduction="sum", normalizer=None)
    parts = []
    for sign in (1.0, -1.0):  # gradients that would cancel if they were summed
        for p in model.parameters():
            p.grad = torch.full_like(p, sign)
        importance.accumulate(model)
        parts.append(Taylor(group_reduction="sum", normalizer=None)(group))
    same(importance(group), parts[0] + parts[1])


def test_accumulated_sums_of_a_pruned_model_are_refused() -> None:
    model, inputs = CASES["normed"].make()
    graph = CASES["normed"].graph(model, inputs)
    importance = FusedImportance()
    importance.accumulate(model)
    first, *_ = graph.get_all_groups(ignored_layers=[model[5]])
    importance(first)
    first.prune(idxs=[0])
    with pytest.raises(ValueError, match=r"pruned since; call reset\(\)"):
        importance(next(iter(graph.get_all_groups(ignored_layers=[model[5]]))))


def test_a_missing_gradient_is_named() -> None:
    model, inputs = CASES["normed"].make()
    groups = CASES["normed"].groups(model, inputs)
    for p in model.parameters():
        p.grad = None
    with pytest.raises(ValueError, match=r"shape \(16, 16\) has no gradient: call backward\(\) first"):
        FusedImportance()(groups[0])


def test_a_criterion_without_a_sum_is_refused() -> None:
    with pytest.raises(ValueError, match="criterion='random': choose one of 'diff-pruning', 'taylor'"):
        FusedImportance("random")


def test_it_drives_a_pruner_to_the_choice_of_theirs() -> None:
    shapes = []
    for importance in (FusedImportance(), Taylor()):
        model, inputs = CASES["unet"].make()
        pruner = tp.pruner.BasePruner(
            model, inputs, importance, pruning_ratio=0.4, global_pruning=True, ignored_layers=[model.conv_out]
        )
        pruner.step()
        shapes.append([tuple(p.shape) for p in model.parameters()])
    assert shapes[0] == shapes[1]
