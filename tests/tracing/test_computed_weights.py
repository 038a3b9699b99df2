"""Weights that a module computes before it runs: by their norm they are sliced exactly, else the cure is named."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import kept_statistics, random_keep, randomised
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import diffprune_fast as dpf
from diffprune_fast.plan import sliced_shapes
from diffprune_fast.scoring.gauss_newton import consumer_members
from diffprune_fast.slicing import SliceError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
Wrap = Callable[..., nn.Module]
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")


class Net(nn.Module):
    """Convolutions of every kind, a norm and linear layers, the last with one output."""

    def __init__(self, wrap: Wrap) -> None:
        super().__init__()
        self.a = wrap(nn.Conv2d(3, 16, 3, padding=1))
        self.depthwise = wrap(nn.Conv2d(16, 16, 3, padding=1, groups=16))
        self.up = wrap(nn.ConvTranspose2d(16, 12, 4, 2, 1))
        self.norm = nn.GroupNorm(3, 12)
        self.grouped = wrap(nn.Conv2d(12, 12, 3, padding=1, groups=3))
        self.plain = nn.Linear(12, 14)
        self.hidden, self.out = wrap(nn.Linear(14, 10)), wrap(nn.Linear(10, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.up(F.silu(self.depthwise(F.silu(self.a(x))))))
        return self.out(F.silu(self.hidden(F.silu(self.plain(self.grouped(h).mean((2, 3)))))))


def folded(model: nn.Module) -> nn.Module:
    """A model with plain weights. (PyTorch's own way takes the weights of all copies away.)"""
    plain = Net(lambda m: m).double().eval()
    with torch.no_grad():
        for theirs, mine in zip(plain.children(), model.children()):
            theirs.weight.copy_(mine.weight)
            theirs.bias.copy_(mine.bias)
    return plain


def assert_exact(model: nn.Module, ratio: float, seed: int) -> dpf.PruneResult:
    """The sliced model against the one with zeros in its plain weights."""
    with torch.no_grad():
        model = randomised(model, seed)
        model(X)  # of the old kind, computed weights that have no graph can be copied
    plan = dpf.trace(model, (X,))
    keep = random_keep(plan, ratio, seed)
    dense = folded(model)
    tensors = dict(dense.named_parameters())
    for (name, dim), kept in sliced_shapes(model, plan, keep).kept.items():
        name = name.replace("parametrizations.weight.original1", "weight").removesuffix("_v")
        if name in tensors:
            gone = np.setdiff1d(np.arange(tensors[name].shape[dim]), kept)
            tensors[name].detach().index_fill_(dim, torch.from_numpy(gone), 0.0)
    result = dpf.prune(model, plan, keep, example_inputs=(X,))
    with torch.no_grad(), kept_statistics("exact"):
        want, got = dense(X), model(X)
    assert (got - want).abs().max() <= 1e-9 * want.abs().max()
    assert result.proof is not None
    assert result.proof.error is not None
    assert result.proof.error < 1e-9
    return result


KINDS = {"hook": torch.nn.utils.weight_norm, "parametrization": parametrizations.weight_norm}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_weights_by_their_norm_are_sliced_along_both_dims(kind: str, seed: int) -> None:
    model = Net(KINDS[kind])
    result = assert_exact(model, 0.4, seed)
    assert result.after.params < 0.5 * result.before.params
    assert (model.a.out_channels, model.depthwise.groups, model.hidden.in_features) == (10, 10, 8)


def test_plan_of_weights_by_their_norm_survives_json() -> None:
    plan = dpf.trace(Net(parametrizations.weight_norm), (X.float(),))
    assert len(plan.norm_fixes) == 6
    assert dpf.Plan.from_json(plan.to_json()) == plan
    assert plan.notes == ()


def test_computed_weight_is_no_feature_left_in_an_attribute() -> None:
    assert dpf.trace(Net(torch.nn.utils.weight_norm), (X.float(),)).notes == ()


def test_computed_weights_with_a_graph_are_copied() -> None:
    """As they are after a step of training: PyTorch's own copy fails."""
    model = Net(torch.nn.utils.weight_norm).double()
    model(X).sum().backward()
    plan = dpf.trace(model, (X,))
    result = dpf.prune(model, plan, random_keep(plan, 0.4, 0), example_inputs=(X,), inplace=False)
    assert result.model.hidden.in_features == 8
    assert model.hidden.weight.requires_grad
    assert result.proof is not None
    assert result.proof.error is not None


def test_row_of_which_only_zeros_would_stay_is_refused() -> None:
    model = Net(parametrizations.weight_norm)
    plan = dpf.trace(model, (X.float(),))
    with torch.no_grad():
        model.hidden.parametrizations.weight.original1[3, :7] = 0
    with pytest.raises(SliceError, match=r"hidden\.parametrizations\.weight\.original0"):
        dpf.prune(model, plan, {"plain": np.arange(7)}, example_inputs=(X.float(),))
    assert model.plain.out_features == 14


def test_damage_is_looked_for_where_weights_by_their_norm_read() -> None:
    """And where none reads, in the gain: along a row of the direction there is no gradient."""
    model = Net(parametrizations.weight_norm)
    members = consumer_members(dpf.trace(model, (X.float(),)), model)
    assert [m.place for m in members["plain"]] == ["hidden.parametrizations.weight.original1:1"]
    assert [m.place for m in members["a"]] == ["up.parametrizations.weight.original1:0"]


class Pair(nn.Module):
    def __init__(self, wrap: Wrap) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), wrap(nn.Conv2d(8, 8, 1)), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.silu(self.b(F.silu(self.a(x)))))


def test_inputs_stay_where_the_gain_is_read_elsewhere() -> None:
    class Penalised(Pair):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.b.parametrizations.weight.original0.sum()

    plan = dpf.trace(Penalised(parametrizations.weight_norm), (X.float(),))
    assert "gain, b.parametrizations.weight.original0, is read elsewhere" in plan.frozen["a.weight:0"]


def test_inputs_stay_where_two_directions_have_one_gain() -> None:
    model = Pair(parametrizations.weight_norm)
    model.c = parametrizations.weight_norm(nn.Conv2d(8, 8, 1))
    model.c.parametrizations.weight.original0 = model.b.parametrizations.weight.original0
    plan = dpf.trace(model, (X.float(),))
    assert plan.groups == ()


CURES = {
    "norm over inputs": (lambda m: parametrizations.weight_norm(m, dim=1), "utils.parametrize.remove_parametrizations"),
    "one norm": (lambda m: torch.nn.utils.weight_norm(m, dim=None), "utils.remove_weight_norm"),
    "spectral": (parametrizations.spectral_norm, "utils.parametrize.remove_parametrizations"),
    "spectral, hook": (torch.nn.utils.spectral_norm, "utils.remove_spectral_norm"),
    "orthogonal": (parametrizations.orthogonal, "utils.parametrize.remove_parametrizations"),
}


@pytest.mark.parametrize("name", CURES)
def test_what_else_computes_a_weight_stays_and_the_cure_is_named(name: str) -> None:
    wrap, cure = CURES[name]
    plan = dpf.trace(Pair(wrap), (X.float(),))
    assert "b" not in {m.parameter.partition(".")[0] for g in plan.groups for m in g.members if m.dim == 0}
    assert any(reason.endswith(f"call torch.nn.{cure} first") for reason in plan.frozen.values())
