"""Processes that finetune together begin alike, and none is left waiting for one that raised."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from processes import run_ranks
from torch import Tensor, nn

from diffprune_fast.recovery.finetune import finetune


class Denoiser(nn.Module):
    """With a buffer, which processes exchange in the forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(sample))))


class Data:
    """Four batches, again and again; the third may be an error."""

    def __init__(self, seed: int = 0, odd: bool = False) -> None:
        self.seed, self.odd = seed, odd

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        for i in range(4):
            if self.odd and i == 2:
                raise ArithmeticError("the third batch is odd")
            yield torch.rand(8, 1, 8, 8, generator=generator) - 0.5


def _fails(model: nn.Module, batch: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    _fails.calls = getattr(_fails, "calls", 0) + 1  # type: ignore[attr-defined]
    if _fails.calls == 4:  # type: ignore[attr-defined]
        raise ArithmeticError("the fourth loss is odd")
    return model(batch, t).square().mean()


def _works(model: nn.Module, batch: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    return model(batch, t).square().mean()


def _rank_main(rank: int, port: int, folder: str, last: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
    }

    def run(loader: Data, **options: Any) -> None:
        finetune(Denoiser(), loader, DDPMScheduler(), **{"steps": 6, "guard": False, "progress": False, **options})

    calls = {
        "steps": lambda: run(Data(), steps=6 + rank),
        "no steps": lambda: run(Data(), steps=6 * (1 - rank)),
        "seed": lambda: run(Data(), seed=rank),
        "data": lambda: run(Data(seed=rank)),
        "nothing": lambda: run(Data()),
        "loss": lambda: run(Data(), loss_fn=_fails if rank == 1 else _works),
    }
    if last == "loader":
        calls = {"loader": lambda: run(Data(odd=rank == 1))}
    said = {}
    for name, call in calls.items():
        began = time.monotonic()
        try:
            call()
            said[name] = "", 0.0
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}", time.monotonic() - began
    torch.save(said, f"{folder}/{last}{rank}")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[str, float]]]:
    """What two processes raised, and after how many seconds."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    for last in ("loss", "loader"):  # a group that a rank left in the middle is of no more use
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        run_ranks(_rank_main, port, str(folder), last)
    both = [[torch.load(folder / f"{x}{rank}", weights_only=True) for x in ("loss", "loader")] for rank in range(2)]
    return [{**first, **second} for first, second in both]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("steps", "rank 1 has steps=7, rank 0 6: all ranks make the same call"),
        ("no steps", "rank 1 has steps=0, rank 0 6"),
        ("seed", "rank 1 has seed=1, rank 0 0"),
        ("data", "rank 1's loader begins with another batch than rank 0's"),
    ],
)
def test_trainings_that_differ_are_found_at_the_start(said: Any, what: str, words: str) -> None:
    for rank in range(2):
        message, _ = said[rank][what]
        assert message.startswith("RankError")
        assert words in message


@pytest.mark.parametrize(("what", "words"), [("loader", "the third batch is odd"), ("loss", "the fourth loss is odd")])
def test_a_rank_that_raises_takes_the_other_along(said: Any, what: str, words: str) -> None:
    assert said[1][what][0] == f"ArithmeticError: {words}"
    message, seconds = said[0][what]
    assert message == f"RankError: rank 1 raised ArithmeticError: {words}"
    assert seconds < 60


def test_afterwards_they_train_together_again(said: Any) -> None:
    assert [said[rank]["nothing"][0] for rank in range(2)] == ["", ""]
