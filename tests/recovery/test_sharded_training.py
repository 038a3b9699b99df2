"""A model that FSDP2 has sharded is trained as a whole one on one process; its state serves both."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from processes import run_ranks
from torch import Tensor, nn

from diffprune_fast.objective.ranks import rank_and_count
from diffprune_fast.recovery.finetune import Finetuned, finetune

LOSSES = ("noise", "mixed")


class Denoiser(nn.Module):
    """Of an odd width, so that the shards are uneven, with parameters that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 9, 3, padding=1)
        self.last = nn.Conv2d(9, 1, 3, padding=1)
        self.unused = nn.Linear(2, 2)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(sample)))


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(7, 1, 8, 8, generator=generator) * 0.2 for _ in range(4)]


class Copying:
    """Batches; when they are walked a third time, after four steps, the state is copied to stay as it is."""

    def __init__(self, state: Path) -> None:
        self.state, self.passes = state, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        if self.passes == 3 and rank_and_count()[0] == 0:
            shutil.copy(self.state, f"{self.state}.half")
        return iter(batches())


def stopped(model: nn.Module, state: Path) -> list[float]:
    """All losses; what the training had kept after four of six steps is beside ``state``."""
    return list(trained(model, loader=Copying(state), checkpoint=state, checkpoint_every=4, guard=False).losses)


def trained(model: nn.Module, loss: str = "noise", loader: Any = None, **options: Any) -> Finetuned:
    more = {} if loss == "noise" else {"teacher": Denoiser(), "loss": loss}
    given: dict[str, Any] = {"steps": 6, "lr": 1e-2, "accumulate": 2, "progress": False, **more, **options}
    return finetune(model, batches() if loader is None else loader, DDPMScheduler(), **given)


def halved() -> Denoiser:
    """Not its own teacher, whose losses would be zero."""
    model = Denoiser()
    with torch.no_grad():
        model.last.weight.mul_(0.5)
    return model


def sharded(model: Any, *, root: bool = True) -> Any:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.first)
    return fully_shard(model) if root else model


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.full_tensor() for name, p in model.state_dict().items()}


def rank_main(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
    }
    torch.distributed.init_process_group("gloo")
    torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    found = {}
    for loss in LOSSES:
        model = sharded(halved())
        done = trained(model, loss)
        found[loss] = list(done.losses), done.before, done.after, whole(model)
    resumed = trained(sharded(halved()), checkpoint=f"{folder}/whole.half", guard=False)
    stopped(sharded(halved()), Path(folder) / "sharded")
    worse = sharded(Denoiser())
    before = whole(worse)
    undone = trained(worse, "mixed", lr=3.0, steps=2)
    same = {name: torch.equal(x, before[name]) for name, x in whole(worse).items()}
    said = ""
    try:
        trained(sharded(Denoiser(), root=False))
    except ValueError as error:
        said = str(error)
    torch.save((found, list(resumed.losses), resumed.resumed, undone.helped, same, said), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("sharded")
    stopped(halved(), folder / "whole")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_ranks(rank_main, port, str(folder))
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[Any]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("loss", LOSSES)
def test_it_ends_as_the_whole_model_on_one_process(found: Any, loss: str) -> None:
    model = halved()
    done = trained(model, loss)
    for theirs, *_ in found:
        losses, before, after, weights = theirs[loss]
        assert losses == pytest.approx(done.losses, rel=1e-4)
        assert (before, after) == (pytest.approx(done.before, rel=1e-4), pytest.approx(done.after, rel=1e-4))
        for name, value in model.state_dict().items():
            torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_it_goes_on_from_the_state_of_a_whole_model(found: Any) -> None:
    losses = list(trained(halved(), guard=False).losses)
    for _, theirs, resumed, *_ in found:
        assert resumed == 4
        assert theirs == pytest.approx(losses, rel=1e-4)


def test_a_whole_model_goes_on_from_its_state(found: Any, folder: Path) -> None:
    resumed = trained(halved(), checkpoint=folder / "sharded.half", guard=False)
    assert resumed.resumed == 4
    assert list(resumed.losses) == pytest.approx(list(trained(halved(), guard=False).losses), rel=1e-4)


def test_it_gets_back_its_weights_where_training_made_it_worse(found: Any) -> None:
    for *_, helped, same, _ in found:
        assert helped is False
        assert all(same.values()), same


def test_parameters_that_were_left_out_are_named(found: Any) -> None:
    for *_, said in found:
        assert said.startswith("last.weight isn't sharded")
