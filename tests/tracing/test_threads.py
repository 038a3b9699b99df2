"""A walk changes what its own thread sees of PyTorch, and nothing else."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch
from torch import Tensor, nn

import diffprune_fast as dpf
from diffprune_fast.tracing import TraceError

X = torch.zeros(1, 3, 8, 8)
PATIENCE = 60  # seconds; nothing waits so long unless it hangs


class Stopped(nn.Module):
    """Two convolutions; the first forward stops half way until it may go on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 1)
        self.inside, self.go_on = Event(), Event()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            h = self.a(x) * torch.as_tensor([2.0], device=x.device)
        self.inside.set()
        assert self.go_on.wait(PATIENCE)
        with torch.autocast(x.device.type, enabled=False):
            return self.b(h / torch.tensor([2.0], device=x.device))


def plan_alone(width: int) -> dpf.Plan:
    model = Stopped(width)
    model.go_on.set()
    return dpf.trace(model, (X,))


def test_two_threads_walk_at_the_same_time() -> None:
    models = Stopped(16), Stopped(24)
    with ThreadPoolExecutor(2) as pool:
        plans = [pool.submit(dpf.trace, model, (X,)) for model in models]
        assert all(model.inside.wait(PATIENCE) for model in models)
        models[0].go_on.set()
        first = plans[0].result(PATIENCE)
        models[1].go_on.set()  # the other's end must not have ended what this one walks in
        second = plans[1].result(PATIENCE)
    assert [first, second] == [plan_alone(16), plan_alone(24)]


def test_another_thread_sees_pytorch_as_it_is_during_a_walk() -> None:
    init, model = torch.autocast.__init__, Stopped(16)
    with ThreadPoolExecutor(1) as pool:
        plan = pool.submit(dpf.trace, model, (X,))
        assert model.inside.wait(PATIENCE)
        try:
            made = [
                torch.as_tensor([2.0], device="meta"),
                torch.tensor([2.0], device="meta"),
                torch.zeros(1, device="meta").new_tensor([2.0]),
            ]
            with pytest.raises(RuntimeError):
                torch.autocast("meta")
        finally:
            model.go_on.set()
        plan.result(PATIENCE)
    assert [t.device.type for t in made] == ["meta"] * 3
    assert torch.autocast.__init__ is init


def test_a_walk_ends_with_pytorch_as_it_was_when_the_forward_fails() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ZeroDivisionError

    init, model = torch.autocast.__init__, Fails()
    with pytest.raises(TraceError):
        dpf.trace(model, (X,))
    assert torch.autocast.__init__ is init
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert torch.tensor([2.0], device="meta").is_meta


def test_the_fast_path_of_attention_is_not_taken() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    plan = dpf.trace(layer, (torch.zeros(1, 5, 16),))
    assert "linear1" in [group.name for group in plan.groups]
