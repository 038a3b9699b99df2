"""Recurrent layers: hidden units go in all gates, layers and directions alike, where nobody hands in a state."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_exact
from torch import Tensor, nn

import diffprune_fast as dpf

X = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


class Net(nn.Module):
    """embed -> recurrent -> two linear layers."""

    def __init__(self, make: Callable[[], nn.Module], width: int = 16) -> None:
        super().__init__()
        self.embed, self.recurrent = nn.Linear(5, 12), make()
        self.read, self.out = nn.Linear(width, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.read(self.run(F.relu(self.embed(x))))))

    def run(self, x: Tensor) -> Tensor:
        return self.recurrent(x)[0]


class Steps(Net):
    """A cell, step by step."""

    def run(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.recurrent(step, state)
        return state[0] if isinstance(state, tuple) else state


class States(Net):
    """The last states of all layers, one after the other."""

    def run(self, x: Tensor) -> Tensor:
        return self.recurrent(x)[1].movedim(0, 1).flatten(1)


NETS: dict[str, Callable[[], Net]] = {
    "RNN": lambda: Net(lambda: nn.RNN(12, 16, batch_first=True, nonlinearity="relu")),
    "GRU": lambda: Net(lambda: nn.GRU(12, 16, batch_first=True, bias=False)),
    "LSTM": lambda: Net(lambda: nn.LSTM(12, 16, batch_first=True)),
    "two layers, both ways": lambda: Net(lambda: nn.LSTM(12, 16, 2, batch_first=True, bidirectional=True), 32),
    "time first": lambda: Net(lambda: nn.GRU(12, 16, 2)),
    "last states": lambda: States(lambda: nn.GRU(12, 16, 2, batch_first=True), 32),
    "LSTM cell": lambda: Steps(lambda: nn.LSTMCell(12, 16)),
    "GRU cell": lambda: Steps(lambda: nn.GRUCell(12, 16)),
    "RNN cell": lambda: Steps(lambda: nn.RNNCell(12, 16)),
}


@pytest.mark.parametrize("name", NETS)
def test_hidden_units_and_inputs_of_recurrent_layers_go(name: str) -> None:
    model = NETS[name]()
    result = assert_exact(model, lambda m: m(X), ratio=0.4, example_inputs=(X,))
    assert (model.recurrent.input_size, model.recurrent.hidden_size) == (7, 10)
    assert result.proof is not None
    assert result.proof.error is not None
    assert result.proof.error < 1e-9


def test_hidden_units_stay_where_a_state_is_handed_in() -> None:
    class Given(Net):
        def forward(self, x: Tensor, h: Tensor) -> Tensor:  # type: ignore[override]
            return self.out(F.relu(self.read(self.recurrent(F.relu(self.embed(x)), h)[0])))

    model = Given(lambda: nn.GRU(12, 16, batch_first=True))
    h = torch.randn(1, 2, 16, dtype=torch.float64)
    assert_exact(model, lambda m: m(X, h), ratio=0.4, example_inputs=(X, h), smaller=1)
    assert (model.recurrent.input_size, model.recurrent.hidden_size) == (7, 16)


def test_projected_hidden_units_are_exact() -> None:
    model = Net(lambda: nn.LSTM(12, 16, batch_first=True, proj_size=8), 8)
    assert_exact(model, lambda m: m(X), ratio=0.4, example_inputs=(X,))
    assert model.recurrent.input_size == 7


def test_ones_in_place_of_a_first_state_keep_its_width() -> None:
    class Ones(Net):
        def run(self, x: Tensor) -> Tensor:
            return self.recurrent(x, torch.ones(1, len(x), self.recurrent.hidden_size, dtype=x.dtype))[0]

    plan = dpf.trace(Ones(lambda: nn.GRU(12, 16, batch_first=True)), (X.float(),))
    assert "recurrent.weight_hh_l0:1" in plan.frozen


def test_first_state_that_is_written_into_keeps_its_width() -> None:
    class Written(Net):
        def run(self, x: Tensor) -> Tensor:
            state = torch.zeros(1, len(x), self.recurrent.hidden_size, dtype=x.dtype)
            state[:, 1:] = 1
            return self.recurrent(x, state)[0]

    plan = dpf.trace(Written(lambda: nn.GRU(12, 16, batch_first=True)), (X.float(),))
    assert "recurrent.weight_hh_l0:1" in plan.frozen


def test_weights_in_one_piece_of_memory_stay() -> None:
    model = Net(lambda: nn.LSTM(12, 16, batch_first=True))
    flat = torch.cat([p.detach().flatten() for p in model.recurrent.parameters()])
    for p, window in zip(model.recurrent.parameters(), flat.split([p.numel() for p in model.recurrent.parameters()])):
        p.data = window.view(p.shape)
    plan = dpf.trace(model, (X.float(),))
    assert list(plan.position) == ["read"]
    assert "one piece of memory, for cuDNN" in plan.frozen["recurrent.weight_ih_l0:0"]
