"""Ranks begin the same work or none, and a rank that raises takes the others along."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_ranks
from torch import Tensor, nn

from diffprune_fast import score, trace
from diffprune_fast.objective.ranks import RankError, compare_batch, reduced, together


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.SiLU(), nn.Linear(12, 2))


def _loss(model: nn.Module, batch: Tensor, *_: Any) -> Tensor:
    return model(batch).square().mean(1)


def _data(seed: int) -> list[Tensor]:
    return [torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))]


class _Fails:
    """A loss that raises on one rank, on its third call."""

    def __init__(self, rank: int) -> None:
        self.left = 2 if rank == 1 else -1

    def __call__(self, model: nn.Module, batch: Tensor, *_: Any) -> Tensor:
        if self.left == 0:
            raise ArithmeticError("the third batch is odd")
        self.left -= 1
        return _loss(model, batch)


def _rank_main(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    model = _model()
    plan = trace(model, (torch.zeros(1, 6),))
    options: dict[str, Any] = {"max_samples": 16, "micro_batch": 4, "progress": False}
    calls = {
        "alone": lambda: rank == 0 and score(model, None, plan, criterion="magnitude", damage=False) and None,
        "seed": lambda: score(model, _data(0), plan, loss_fn=_loss, seed=rank, **options),
        "data": lambda: score(model, _data(rank), plan, loss_fn=_loss, **options),
        "plan": lambda: score(*_of(6 + rank), loss_fn=_loss, **options),
        "raises": lambda: score(model, _data(0), plan, loss_fn=_Fails(rank), **options),
    }
    said = {}
    for name, call in calls.items():
        began = time.monotonic()
        try:
            call()
            said[name] = "nothing", 0.0
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}", time.monotonic() - began
    torch.save(said, f"{path}-{rank}.pt")
    torch.distributed.destroy_process_group()


def _of(width: int) -> tuple[nn.Module, list[Tensor], Any]:
    model = nn.Sequential(nn.Linear(6, width), nn.SiLU(), nn.Linear(width, 2))
    return model, _data(0), trace(model, (torch.zeros(1, 6),))


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[str, float]]]:
    """What two ranks raised, and after how many seconds."""
    path: Path = tmp_path_factory.mktemp("ranks") / "store"
    run_ranks(_rank_main, str(path))
    return [torch.load(f"{path}-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("seed", "rank 1 has seed=1, rank 0 0: all ranks make the same call"),
        ("data", "rank 1's loader begins with another batch than rank 0's"),
        ("plan", "rank 1 has plan="),
    ],
)
def test_ranks_at_different_work_are_found_at_the_start(said: Any, what: str, words: str) -> None:
    for rank in range(2):
        message, _ = said[rank][what]
        assert message.startswith("RankError")
        assert words in message


def test_a_rank_that_raises_takes_the_other_along(said: Any) -> None:
    assert said[1]["raises"][0] == "ArithmeticError: the third batch is odd"
    message, seconds = said[0]["raises"]
    assert message == "RankError: rank 1 raised ArithmeticError: the third batch is odd"
    assert seconds < 60


def test_what_needs_no_data_may_be_done_by_one_rank_alone(said: Any) -> None:
    assert [said[rank]["alone"][0] for rank in range(2)] == ["nothing"] * 2


def test_one_process_calls_the_function_itself() -> None:
    @together
    def doubled(loader: list[Tensor]) -> Tensor:
        compare_batch(loader[0])
        return 2 * reduced(loader[0])

    assert doubled([torch.ones(2)]).tolist() == [2, 2]
    assert doubled.__name__ == "doubled"
    assert issubclass(RankError, RuntimeError)
