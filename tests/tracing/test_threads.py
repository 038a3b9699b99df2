"""A walk changes what its own thread sees of PyTorch, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

import pytest
import torch
from torch import Tensor, nn

import diffprune_fast as dpf
from diffprune_fast.tracing import TraceError

X = torch.zeros(1, 3, 8, 8)
PATIENCE = 60  # seconds; nothing waits so long unless it hangs


class Stop:
    """Where a forward stops until it may go on."""

    def __init__(self) -> None:
        self.reached, self.lifted = Event(), Event()

    def wait(self) -> None:
        self.reached.set()
        assert self.lifted.wait(PATIENCE)


class Net(nn.Module):
    """Two convolutions with something in between."""

    def __init__(self, width: int, between: Callable[[], object]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            h = self.a(x) * torch.as_tensor([2.0], device=x.device)
        self.between()
        with torch.autocast(x.device.type, enabled=False):
            return self.b(h / torch.tensor([2.0], device=x.device))


@contextmanager
def walks(*widths: int) -> Iterator[tuple[list[Stop], list[Future[dpf.Plan]]]]:
    """A thread for each width, in the middle of its walk."""
    stops = [Stop() for _ in widths]
    with ThreadPoolExecutor(len(widths)) as pool:
        try:
            nets = [Net(width, lambda stop=stop: stop.wait()) for width, stop in zip(widths, stops)]
            plans = [pool.submit(dpf.trace, net, (X,)) for net in nets]
            assert all(stop.reached.wait(PATIENCE) for stop in stops)
            yield stops, plans
        finally:
            for stop in stops:
                stop.lifted.set()


def test_two_threads_walk_at_the_same_time() -> None:
    alone = [dpf.trace(Net(width, lambda: None), (X,)) for width in (16, 24)]
    with walks(16, 24) as (stops, plans):
        stops[0].lifted.set()
        first = plans[0].result(PATIENCE)
        stops[1].lifted.set()  # the end of the other's walk has not ended what this one walks in
        assert [first, plans[1].result(PATIENCE)] == alone


def test_another_thread_sees_pytorch_as_it_is_during_a_walk() -> None:
    with walks(16) as (_, plans):
        made = [
            torch.as_tensor([2.0], device="meta"),
            torch.tensor([2.0], device="meta"),
            torch.zeros(1, device="meta").new_tensor([2.0]),
        ]
        where = torch.zeros(1, device="meta")
        assert (where.is_meta, where.device.type) == (True, "meta")
    assert [t.device.type for t in made] == ["meta"] * 3
    assert plans[0].result(PATIENCE)["a"].n_units == 16


def test_a_walk_ends_with_pytorch_as_it_was_when_the_forward_fails() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ZeroDivisionError

    model = Fails()
    with pytest.raises(TraceError):
        dpf.trace(model, (X,))
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert torch.tensor([2.0], device="meta").is_meta


def test_the_fast_path_of_attention_is_not_taken() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    plan = dpf.trace(layer, (torch.zeros(1, 5, 16),))
    assert "linear1" in [group.name for group in plan.groups]
