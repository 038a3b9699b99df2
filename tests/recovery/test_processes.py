"""Finetuning on accelerate: several processes, several batches a step, precision, trackers, what is shown."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker, on_main_process
from accelerate.utils import DistributedType
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DModel
from processes import run_ranks
from torch import Tensor, nn

from diffprune_fast.recovery.finetune import finetune


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 1, 3, padding=1)
        self.unused = nn.Linear(2, 2)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(sample)))


def batches(n: int = 4, size: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(size, 1, 8, 8, generator=generator) * 0.2 for _ in range(n)]


def run(model: nn.Module, loader: Any = None, **options: Any) -> list[float]:
    given = {"steps": 6, "lr": 1e-2, "progress": False, **options}
    return list(finetune(model, batches() if loader is None else loader, DDPMScheduler(), **given).losses)


def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )


def rank_main(rank: int, ranks: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
    }
    model, teacher = Denoiser(), Denoiser()
    losses = run(model, batches(size=7), accumulate=2, checkpoint=f"{folder}/state", checkpoint_every=4)
    other = Denoiser()
    with torch.no_grad():
        other.last.weight.mul_(0.5)
    distilled = run(other, teacher=teacher, teacher_share=0.7)
    torch.save((losses, model.state_dict(), distilled), f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_end_as_one_does(tmp_path):
    """Batches of seven, so that the processes' parts differ in size."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_ranks(rank_main, 2, port, str(tmp_path))
    model, other = Denoiser(), Denoiser()
    losses = run(model, batches(size=7), accumulate=2)
    with torch.no_grad():
        other.last.weight.mul_(0.5)
    distilled = run(other, teacher=Denoiser(), teacher_share=0.7)
    for rank in (0, 1):
        found, weights, of_teacher = torch.load(tmp_path / str(rank))
        assert found == pytest.approx(losses, rel=1e-4)
        assert of_teacher == pytest.approx(distilled, rel=1e-4)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=1e-4, msg=name)
    again = Denoiser()
    assert run(again, batches(size=7), accumulate=2, checkpoint=tmp_path / "state") == pytest.approx(losses, rel=1e-4)


def test_several_batches_a_step_are_averaged():
    one, two = Denoiser(), Denoiser()
    images, generator = batches(1)[0], torch.Generator().manual_seed(3)
    noise, t = torch.randn(16, 1, 8, 8, generator=generator), torch.arange(16) * 60

    def loss(model: nn.Module, batch: Tensor, *_: Tensor) -> Tensor:
        rows = slice(0, 8) if torch.equal(batch[0], images[0]) else slice(8, 16)
        rows = slice(0, 16) if len(batch) == 16 else rows
        return (model(batch + noise[rows], t[rows]) - noise[rows]).square().flatten(1).mean(1)

    whole = run(one, [images], loss_fn=loss)
    parts = run(two, [images[:8], images[8:]], loss_fn=loss, accumulate=2)
    assert parts == pytest.approx(whole, rel=1e-4)
    torch.testing.assert_close(one.first.weight, two.first.weight, atol=1e-5, rtol=1e-4)


def test_checkpointed_gradients_are_the_same_gradients():
    plain, checkpointed = unet(), unet()
    assert run(checkpointed, gradient_checkpointing=True) == pytest.approx(run(plain), rel=1e-4)
    assert not checkpointed.is_gradient_checkpointing
    with pytest.raises(ValueError, match="Denoiser offers no gradient checkpointing"):
        run(Denoiser(), gradient_checkpointing=True)


def test_a_checkpointed_autoencoder_trains():
    torch.manual_seed(0)
    vae = AutoencoderKL(1, 1, block_out_channels=(8,), norm_num_groups=4, sample_size=8)
    losses = run(vae, steps=12, gradient_checkpointing=True)
    assert losses[-1] < losses[0]


class Log(GeneralTracker):
    name, requires_logging_directory = "log", False

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.rows: list[dict[str, float]] = []
        self.finished = False

    @property
    def tracker(self) -> list[dict[str, float]]:
        return self.rows

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    @on_main_process
    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        self.rows.append({**values, "step": step})

    @on_main_process
    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def accelerator():
    """For one's own accelerator; the next test has other choices."""
    yield lambda **options: Accelerator(cpu=True, **options)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_trackers_get_every_step(accelerator):
    log = Log()
    losses = run(Denoiser(), accelerator=accelerator(log_with=log), warmup=2)
    assert [row["loss"] for row in log.rows] == losses
    assert [row["step"] for row in log.rows] == list(range(6))
    assert [row["lr"] for row in log.rows[:3]] == pytest.approx([0, 5e-3, 1e-2])
    assert log.config["steps"] == 6
    assert log.finished


def test_the_accelerators_precision_is_the_forwards(accelerator):
    seen = []

    def loss(model: nn.Module, batch: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        answer = model(batch, t)
        seen.append(answer.dtype)
        return answer.float().square().mean()

    run(Denoiser(), accelerator=accelerator(mixed_precision="bf16"), loss_fn=loss, steps=1, guard=False)
    assert seen == [torch.bfloat16]


def test_a_training_leaves_no_choices_behind_for_the_next():
    run(Denoiser(), steps=1)
    assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"
    AcceleratorState._reset_state(reset_partial_state=True)


def test_sharded_training_is_refused(accelerator, monkeypatch):
    mine = accelerator()
    monkeypatch.setattr(mine.state, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match="doesn't support FSDP"):
        run(Denoiser(), accelerator=mine)


def test_without_a_terminal_there_are_ten_lines(capsys):
    run(Denoiser(), steps=30, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("finetuning: 3 of 30 steps, loss 0.")
    assert lines[-1].startswith("finetuning: 30 of 30 steps")


@pytest.mark.parametrize(("option", "value"), [("accumulate", 0), ("checkpoint_every", 0)])
def test_counts_below_one_are_refused(option: str, value: int):
    with pytest.raises(ValueError, match=f"{option} is {value}"):
        run(Denoiser(), **{option: value})


def test_a_state_goes_into_a_folder_that_is_not_there_yet(tmp_path: Path):
    run(Denoiser(), steps=1, checkpoint=tmp_path / "a" / "b" / "state")
    assert (tmp_path / "a" / "b" / "state").is_file()
