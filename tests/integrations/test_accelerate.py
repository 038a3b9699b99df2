"""Inside accelerate() Torch-Pruning does what it does outside, and leaves no trace when the block ends."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_pruning as tp
from pruned_by_tp import CASES, grouped
from torch import Tensor, nn

from diffprune_fast import ops
from diffprune_fast.integrations.torch_pruning import accelerate, acceleration, pending

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def pruner_of(case: str, importance: Any = None, **options: Any) -> Any:
    model, inputs = CASES[case].make()
    if importance is None:
        importance = tp.importance.GroupTaylorImportance()
    if case == "vit":
        heads = [m for n, m in model.named_modules() if n.endswith(("q_proj", "k_proj", "v_proj"))]
        options = {"num_heads": dict.fromkeys(heads, 4), **options}
    options = {"pruning_ratio": 0.5, "ignored_layers": CASES[case].ignored(model), **options}
    return tp.pruner.BasePruner(model, inputs, importance, **options)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.detach() for n, p in model.named_parameters()}
    found |= {f"{n}.grad": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {**found, **dict(model.named_buffers())}


def equal(a: nn.Module, b: nn.Module) -> None:
    one, two = tensors(a), tensors(b)
    assert list(one) == list(two)
    assert [n for n in one if not torch.equal(one[n], two[n])] == []
    assert repr(a) == repr(b)


def traces() -> dict[tuple[type, str], Any]:
    return {(owner, name): vars(owner)[name] for owner, name in acceleration._REPLACED}


@pytest.mark.parametrize(
    "options", [{}, {"global_pruning": True}, {"isomorphic": True, "global_pruning": True}], ids=str
)
@pytest.mark.parametrize("case", CASES)
def test_a_step_prunes_the_same_channels(case: str, options: dict[str, Any]) -> None:
    outside, inside = pruner_of(case, **options), pruner_of(case, **options)
    before = sum(p.numel() for p in inside.model.parameters())
    outside.step()
    with accelerate():
        inside.step()
    equal(outside.model, inside.model)
    assert outside.pruning_history() == inside.pruning_history()
    assert sum(p.numel() for p in inside.model.parameters()) < 0.8 * before


@pytest.mark.parametrize("importance", [
    tp.importance.GroupTaylorImportance(multivariable=True), tp.importance.LAMPImportance(),
    tp.importance.MagnitudeImportance(p=1, group_reduction="first"), tp.importance.BNScaleImportance(),
    tp.importance.FPGMImportance(),
], ids=lambda importance: type(importance).__name__)  # fmt: skip
def test_a_step_by_other_importances(importance: Any) -> None:
    outside, inside = pruner_of("resnet", importance), pruner_of("resnet", importance)
    outside.step()
    with accelerate():
        inside.step()
    equal(outside.model, inside.model)
    assert outside.pruning_history()


@pytest.mark.parametrize("kind", [tp.pruner.GroupNormPruner, tp.pruner.BNScalePruner, tp.pruner.GrowingRegPruner])
def test_pruners_of_other_algorithms(kind: Any) -> None:
    models = []
    for inside in (False, True):
        model, inputs = CASES["residual"].make()
        pruner = kind(
            model, inputs, tp.importance.MagnitudeImportance(), pruning_ratio=0.5, ignored_layers=[model.head]
        )
        with accelerate() if inside else torch.enable_grad():
            pruner.regularize(model)
            pruner.step()
        models.append(model)
    equal(*models)


def test_iterative_steps() -> None:
    outside, inside = pruner_of("resnet", iterative_steps=3), pruner_of("resnet", iterative_steps=3)
    for _ in range(3):
        outside.step()
        with accelerate():
            inside.step()
    equal(outside.model, inside.model)


@pytest.mark.parametrize("case", CASES)
def test_a_step_outside_after_one_inside(case: str) -> None:
    outside, mixed = pruner_of(case, iterative_steps=2), pruner_of(case, iterative_steps=2)
    outside.step()
    with accelerate():
        mixed.step()
    outside.step()
    mixed.step()
    equal(outside.model, mixed.model)
    assert outside.pruning_history() == mixed.pruning_history()


def test_the_pruner_holds_no_weight_of_the_dense_model() -> None:
    model, x = (
        nn.Sequential(nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2)),
        torch.randn(2, 4),
    )
    pruner = tp.pruner.BasePruner(
        model, x, tp.importance.MagnitudeImportance(), pruning_ratio=0.5, ignored_layers=[model[4]]
    )
    dense = weakref.ref(model[2].weight)
    with accelerate():
        pruner.step()
    assert model[2].weight.shape == (64, 64)
    assert dense() is None


def test_a_loss_computed_before_a_step_still_finds_the_weights_whole() -> None:
    model, x = nn.Sequential(nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 2)), torch.randn(2, 4, requires_grad=True)
    pruner = tp.pruner.BasePruner(
        model, x, tp.importance.MagnitudeImportance(), pruning_ratio=0.5, ignored_layers=[model[2]]
    )
    loss = model(x).square().sum()
    (wanted,) = torch.autograd.grad(loss, x, retain_graph=True)
    with accelerate():
        pruner.step()
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], wanted)


def test_an_interactive_step() -> None:
    outside, inside = pruner_of("unet"), pruner_of("unet")
    outside.step()
    with accelerate():
        for group in inside.step(interactive=True):
            before = group[0].dep.target.module.weight.shape
            group.prune()
            assert group[0].dep.target.module.weight.shape != before
    equal(outside.model, inside.model)
    assert outside.pruning_history() == inside.pruning_history()


@pytest.mark.parametrize("case", CASES)
def test_groups_inside_a_step_are_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pruner, compared = pruner_of(case), []
    real = acceleration.StepGroups.group

    def both(self: Any, *args: Any) -> Any:
        ours, theirs = real(self, *args), original(self.graph, *args)
        assert [(i.dep, i.idxs, i.root_idxs) for i in ours.items] == [
            (i.dep, i.idxs, i.root_idxs) for i in theirs.items
        ]
        compared.append(len(ours))
        return ours

    original = vars(tp.DependencyGraph)["get_pruning_group"]
    monkeypatch.setattr(acceleration.StepGroups, "group", both)
    with accelerate():
        pruner.step()
    assert len(compared) > 1


def test_a_step_slices_everything_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = launches(monkeypatch)
    pruner = pruner_of("unet")
    with accelerate():
        pruner.step()
    assert len(calls) == 1
    assert calls[0] > 50


def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls, real = [], ops.slice_channels_

    def run(tensors: Any, slices: Any) -> None:
        calls.append(len(tensors))
        real(tensors, slices)

    monkeypatch.setattr(pending.ops, "slice_channels_", run)
    return calls


def test_a_group_slices_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = CASES["resnet"].make()
    groups = CASES["resnet"].groups(model, inputs)
    calls = launches(monkeypatch)
    with accelerate():
        groups[0].prune(idxs=[1, 3])
    assert len(calls) == 1


def test_frozen_parameters_stay_frozen() -> None:
    pruner = pruner_of("resnet")
    for p in pruner.model.parameters():
        p.requires_grad_(False)
    with accelerate():
        pruner.step()
    assert not any(p.requires_grad for p in pruner.model.parameters())


def test_channels_last_stays() -> None:
    pruner = pruner_of("unet")
    pruner.model.to(memory_format=torch.channels_last)
    with accelerate():
        pruner.step()
    wide = [p for p in pruner.model.parameters() if p.dim() == 4 and p.shape[2] > 1]
    assert wide
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in wide)


def test_whoever_holds_a_weight_finds_it_whole() -> None:
    model = nn.Sequential(nn.Linear(600, 600), nn.ReLU(), nn.Linear(600, 2))  # large enough to be compacted in place
    held, copied = model[0].weight, model[0].weight.detach().clone()
    graph = tp.DependencyGraph().build_dependency(model, torch.ones(1, 600))
    with accelerate():
        graph.get_pruning_group(model[0], tp.prune_linear_out_channels, [0, 7]).prune()
    assert model[0].weight is not held
    assert torch.equal(held, copied)


def test_tied_weights_are_sliced_once_for_each_layer() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.a(x)) + torch.relu(self.b(x)))

    torch.manual_seed(0)
    model = Tied()
    twin = copy.deepcopy(model)
    for m, block in ((twin, torch.enable_grad()), (model, accelerate())):
        graph = tp.DependencyGraph().build_dependency(m, torch.ones(1, 6))
        with block:
            graph.get_pruning_group(m.a, tp.prune_linear_out_channels, [1, 4]).prune()
    assert model.b.weight.shape == (4, 6)
    equal(model, twin)


def test_pruning_functions_on_their_own() -> None:
    one, two = grouped(), grouped()
    two.load_state_dict(one.state_dict())
    tp.prune_conv_out_channels(one[0], [1, 5])
    with accelerate():
        tp.prune_conv_out_channels(two[0], [1, 5])
    equal(one, two)


def test_a_pruner_of_a_layer_of_ones_own_finds_tensors_sliced() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.linspace(1, 2, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    seen = []

    class ScalePruner(tp.pruner.BasePruningFunc):
        TARGET_MODULES = Scale

        def prune_out_channels(self, layer: Any, idxs: Any) -> Any:
            seen.append(model[0].weight.shape)
            keep = [i for i in range(len(layer.scale)) if i not in idxs]
            layer.scale = nn.Parameter(layer.scale.detach()[keep])
            return layer

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer: Any) -> int:
            return len(layer.scale)

        get_in_channels = get_out_channels

    model = nn.Sequential(nn.Linear(3, 8), Scale(), nn.Linear(8, 2))
    pruner = tp.pruner.BasePruner(
        model, torch.ones(1, 3), tp.importance.MagnitudeImportance(), ignored_layers=[model[2]],
        customized_pruners={Scale: ScalePruner()}, root_module_types=[nn.Linear],
    )  # fmt: skip
    with accelerate():
        pruner.step()
    assert seen == [(4, 3)]
    assert model(torch.ones(1, 3)).shape == (1, 2)


def test_kept_says_which_channels_are_left() -> None:
    pruner = pruner_of("unet", iterative_steps=2)
    dense = copy.deepcopy(pruner.model)
    with accelerate() as inside:
        pruner.step()
        pruner.step()
    found = inside.kept(pruner.model)
    assert len(found) > 20
    for name, p in pruner.model.named_parameters():
        expected = dense.get_parameter(name).detach()
        for dim in range(p.dim()):
            if (name, dim) in found:
                expected = expected.index_select(dim, torch.from_numpy(found[name, dim]))
        assert torch.equal(p, expected), name


def test_nothing_is_left_behind() -> None:
    before = traces()
    identities = list(tp.pruner.function.PrunerBox.values())
    with accelerate(), accelerate():
        assert traces() != before
    assert traces() == before
    assert list(tp.pruner.function.PrunerBox.values()) == identities


def test_nothing_is_left_behind_after_an_error() -> None:
    before = traces()
    with pytest.raises(RuntimeError, match="from inside"), accelerate():
        raise RuntimeError("from inside")
    assert traces() == before


def test_what_was_pruned_before_an_error_is_sliced() -> None:
    pruner, pruned = pruner_of("residual"), []

    prune = pruner._prune

    def two_groups() -> Any:
        for group in prune():
            if len(pruned) == 2:
                raise RuntimeError("from inside")
            pruned.append(group)
            yield group

    pruner._prune = two_groups
    with pytest.raises(RuntimeError, match="from inside"), accelerate():
        pruner.step()
    for layer in pruner.model.modules():
        if isinstance(layer, nn.Conv2d):
            assert tuple(layer.weight.shape[:2]) == (layer.out_channels, layer.in_channels)


def test_pruning_functions_are_the_same_objects_inside() -> None:
    functions = {name: getattr(tp, name) for name in dir(tp) if name.startswith("prune_")}
    with accelerate():
        assert all(getattr(tp, name) is f for name, f in functions.items())
        assert tp.prune_conv_out_channels == tp.pruner.function.PrunerBox[tp.ops.OPTYPE.CONV].prune_out_channels


def test_other_threads_are_not_concerned(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = launches(monkeypatch)
    conv = nn.Conv2d(3, 4, 1)
    with accelerate():
        run(lambda: tp.prune_conv_out_channels(conv, [0]))
    assert conv.weight.shape[0] == 3
    assert not calls


def test_a_block_that_ends_in_one_thread_leaves_the_others() -> None:
    before, entered, leave, worked = traces(), threading.Event(), threading.Event(), []

    def long() -> None:
        with accelerate():
            entered.set()
            leave.wait(30)
            worked.append(traces() != before)

    thread = threading.Thread(target=long)
    thread.start()
    entered.wait(30)
    with accelerate():
        pass
    leave.set()
    thread.join()
    assert worked == [True]
    assert traces() == before


def run(work: Callable[[], Any]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_as_a_decorator() -> None:
    @accelerate()
    def prune(pruner: Any) -> bool:
        pruner.step()
        return traces() != before

    before, outside, inside = traces(), pruner_of("normed"), pruner_of("normed")
    outside.step()
    assert prune(inside)
    assert traces() == before
    equal(outside.model, inside.model)
