"""A training that is stopped at any moment goes on and ends as if it hadn't been."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from processes import new_process
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diffprune_fast.objective.loss import make_objective
from diffprune_fast.recovery.finetune import Finetuned, finetune

STEPS = 9
# Without the guard, whose calls of the loss would be counted too.
GIVEN = {"steps": STEPS, "lr": 1e-2, "guard": False, "progress": False}


class Denoiser(nn.Module):
    """With dropout, which draws from the global generator, and a buffer that training changes."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(0.3)
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.last(self.dropout(torch.relu(self.norm(self.first(sample)))))


def loader() -> DataLoader:
    """Shuffled anew in every pass of five batches; every image is changed at random when it is read."""
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    own = torch.Generator().manual_seed(7)

    def collate(chosen: list[Tensor]) -> Tensor:
        return torch.stack(chosen) + 0.1 * torch.rand(8, 1, 8, 8) + 0.1 * torch.rand(8, 1, 8, 8, generator=own)

    return DataLoader(images, batch_size=8, shuffle=True, generator=own, collate_fn=collate)


class Stop(Exception):
    pass


def run(model: nn.Module, *, stop_in: int | None = None, kill: bool = False, **options) -> Finetuned:
    """A finetune whose loss stops everything at its ``stop_in``-th call."""
    objective, calls = make_objective(model, DDPMScheduler()), []

    def loss(model: nn.Module, batch: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        calls.append(0)
        if stop_in is not None and len(calls) == stop_in:
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Stop
        return objective.loss(model, batch, t, noise, reduction="none")

    return finetune(model, loader(), loss_fn=loss, **{**GIVEN, **options})


@pytest.fixture(scope="module")
def unbroken() -> tuple[Finetuned, nn.Module]:
    model = Denoiser()
    return run(model), model


def check_same(done: Finetuned, model: nn.Module, unbroken: tuple[Finetuned, nn.Module]) -> None:
    assert done.losses == pytest.approx(unbroken[0].losses, rel=1e-5)
    for (name, a), b in zip(model.state_dict().items(), unbroken[1].state_dict().values()):
        torch.testing.assert_close(a, b, msg=name)


def killed(path: Path) -> None:
    torch.set_num_threads(1)
    run(Denoiser(), stop_in=8, kill=True, checkpoint=path, checkpoint_every=3)


def test_a_killed_process_is_gone_on_from(tmp_path, unbroken):
    path = tmp_path / "state"
    process = new_process(killed, path)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    model = Denoiser()
    done = run(model, checkpoint=path, checkpoint_every=3)
    assert done.resumed == 6
    check_same(done, model, unbroken)


@pytest.mark.parametrize("stops", [(1,), (6, 1, 4), (5, 5)], ids=str)
def test_however_often_it_stops_it_ends_the_same(tmp_path, unbroken, stops):
    for stop in stops:
        with pytest.raises(Stop):
            run(Denoiser(), stop_in=stop, checkpoint=tmp_path / "state", checkpoint_every=1)
    model = Denoiser()
    check_same(run(model, checkpoint=tmp_path / "state"), model, unbroken)


def test_a_write_that_breaks_off_leaves_the_former_state(tmp_path, unbroken, monkeypatch):
    def broken(state: object, file: object) -> None:
        file.write(b"half")
        raise Stop

    path = tmp_path / "state"
    with pytest.raises(Stop):
        run(Denoiser(), stop_in=4, checkpoint=path, checkpoint_every=1)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", broken)
        with pytest.raises(Stop):
            run(Denoiser(), checkpoint=path, checkpoint_every=1)
    model = Denoiser()
    done = run(model, checkpoint=path)
    assert done.resumed == 3
    check_same(done, model, unbroken)


def test_a_finished_training_is_not_run_again(tmp_path, unbroken):
    run(Denoiser(), checkpoint=tmp_path / "state")
    model = Denoiser()
    done = run(model, stop_in=1, checkpoint=tmp_path / "state")
    assert done.resumed == STEPS
    check_same(done, model, unbroken)


def test_the_state_of_another_training_or_model_is_refused_and_changes_nothing(tmp_path):
    path = tmp_path / "state"
    run(Denoiser(), checkpoint=path)
    model = Denoiser(width=16)
    before = model.first.weight.detach().clone()
    with pytest.raises(ValueError, match=r"lr=0.01, not lr=0.02: remove it"):
        run(Denoiser(), checkpoint=path, lr=0.02)
    with pytest.raises(ValueError, match=r"of another model: first.bias is \(8,\) there, \(16,\) here"):
        run(model, checkpoint=path)
    assert torch.equal(model.first.weight, before)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="can't be read as a training's state"):
        run(Denoiser(), checkpoint=path)
