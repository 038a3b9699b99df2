"""Models that FSDP2 has sharded are refused with what to do, and what is to be done works: on 2 ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import diffprune_fast as dpf
from diffprune_fast.compensation import compensate

HIDDEN = 16


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, HIDDEN, 3, padding=1)
        self.last = nn.Conv2d(HIDDEN, 1, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(sample)))


EXAMPLE = (torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.long))
OPTIONS: dict[str, Any] = {"max_samples": 64, "progress": False}


def _batches() -> list[Tensor]:
    return [torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1]


def _rank_main(rank: int, folder: str) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    plan = dpf.trace(Denoiser(), EXAMPLE)
    sharded: Any = fully_shard(Denoiser())
    uses = {
        "trace": lambda: dpf.trace(sharded, EXAMPLE),
        "score": lambda: dpf.score(sharded, _batches(), plan, **OPTIONS),
        "score_and_prune": lambda: dpf.score_and_prune(sharded, _batches(), example_inputs=EXAMPLE, **OPTIONS),
        "compensate": lambda: compensate(sharded, Denoiser(), _batches(), kept={}, progress=False),
        "finetune": lambda: dpf.finetune(sharded, _batches(), steps=1, progress=False),
    }
    said = {}
    for name, use in uses.items():
        try:
            use()
            said[name] = "nothing"
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    # what the errors say is to be done
    whole = Denoiser()
    whole.load_state_dict(get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True)))
    result = dpf.score_and_prune(whole, _batches(), ratio=0.5, example_inputs=EXAMPLE, **OPTIONS)
    before = result.model(_batches()[0], torch.zeros(32, dtype=torch.long)).detach()
    smaller: Any = fully_shard(result.model)
    after = smaller(_batches()[0], torch.zeros(32, dtype=torch.long))
    after.square().mean().backward()
    widths = [tuple(p.shape) for p in smaller.parameters()]
    torch.save((said, before, after.detach(), widths), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder: Path = tmp_path_factory.mktemp("sharded")
    mp.start_processes(_rank_main, (str(folder),), nprocs=2, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("use", ["trace", "score", "score_and_prune", "compensate", "finetune"])
def test_a_sharded_model_is_refused_with_what_to_do(found: Any, use: str) -> None:
    for said, *_ in found:
        assert "first.weight is" in said[use], said[use]
        assert "shard" in said[use]


def test_a_model_is_pruned_and_then_sharded(found: Any) -> None:
    for _, before, after, widths in found:
        assert widths[0] == (HIDDEN // 2, 1, 3, 3)
        torch.testing.assert_close(after, before)
