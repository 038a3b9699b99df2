"""Models that FSDP2 has sharded, on 2 ranks: pruned into smaller sharded ones; what needs whole ones says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from processes import run_ranks
from torch import Tensor, nn

import diffprune_fast as dpf
from diffprune_fast.compensation import compensate
from diffprune_fast.slicing import prune_sharded

EXAMPLE = (torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.long))
OPTIONS: dict[str, Any] = {"max_samples": 64, "progress": False}
REFUSED = ("score_and_prune", "prune", "compensate")


def _unet() -> UNet2DModel:
    """Odd widths, so that shards are uneven, before and after; frozen and tied parameters."""
    torch.manual_seed(0)
    model = UNet2DModel(
        8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(9, 15),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=5,
        norm_num_groups=3,
    )
    model.conv_out.bias.requires_grad_(False)
    first, second = model.mid_block.resnets
    second.conv1.weight = first.conv1.weight
    model.register_buffer("seen", torch.arange(3.0))
    return model


def _shard(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for block in [*model.down_blocks, model.mid_block, *model.up_blocks]:
        fully_shard(block)
    return fully_shard(model)


def _keep(plan: dpf.Plan, seed: int = 0) -> dict[str, np.ndarray]:
    from diffprune_fast.scoring.scores import rehearsed_scores

    return dict(dpf.select(plan, rehearsed_scores(plan), ratio=0.4).keep)


def _batches() -> list[Tensor]:
    return [torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1]


def _answer(model: nn.Module) -> Tensor:
    found: Tensor = model(_batches()[0], torch.full((32,), 7)).sample
    return found


def _said(model: Any, plan: dpf.Plan) -> dict[str, str]:
    uses: dict[str, Any] = {
        "score_and_prune": lambda: dpf.score_and_prune(model, _batches(), **OPTIONS),
        "prune": lambda: dpf.prune(model, plan, _keep(plan)),
        "compensate": lambda: compensate(model, _unet(), _batches(), kept={}, progress=False),
    }
    said = {}
    for name, use in uses.items():
        try:
            use()
            said[name] = "nothing"
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def _rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    model = _shard(_unet())
    model.answered = _answer(model)  # as weight_norm keeps what it computes
    plan = dpf.trace(model)
    said = _said(model, plan)
    dense = _answer(model)
    result = prune_sharded(model, plan, _keep(plan), _shard)
    smaller: Any = result.model
    held = {name: (tuple(p.shape), p.to_local().numel(), p.requires_grad) for name, p in smaller.named_parameters()}
    weights = {name: x.full_tensor() for name, x in smaller.named_parameters()}
    answer = _answer(smaller)
    answer.square().mean().backward()
    reached = all(p.grad is not None for p in smaller.parameters() if p.requires_grad)
    again = torch.allclose(_answer(model), dense, atol=1e-5)
    result.save_pretrained(f"{folder}/saved")
    after = result.after.params
    torch.save((said, held, weights, answer.detach(), reached, again, after), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("sharded")
    run_ranks(_rank_main, str(folder))
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[Any]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def pruned() -> Any:
    """The whole model, pruned by the same plan and keep-set."""
    model = _unet()
    plan = dpf.trace(model)
    return dpf.prune(model, plan, _keep(plan))


@pytest.mark.parametrize("use", REFUSED)
def test_what_needs_a_whole_model_says_what_to_do(found: Any, use: str) -> None:
    for said, *_ in found:
        assert "conv_in.weight is sharded" in said[use], said[use]
        assert "prune_sharded" in said[use]


def test_its_weights_are_those_of_the_whole_model_pruned(found: Any, pruned: Any) -> None:
    for _, _, weights, *_, after in found:
        assert after == pruned.after.params
        theirs = dict(pruned.model.named_parameters())
        assert weights.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(weights[name], value.detach(), rtol=1e-6, atol=0, msg=name)


def test_every_rank_holds_its_part_of_the_smaller_model(found: Any, pruned: Any) -> None:
    for name, p in pruned.model.named_parameters():
        (shape, first, trained), (_, second, _) = (held[name] for _, held, *_ in found)
        assert shape == tuple(p.shape)
        assert first + second == p.numel()
        assert trained == p.requires_grad


def test_it_answers_as_the_whole_model_pruned(found: Any, pruned: Any) -> None:
    for _, _, _, answer, *_ in found:
        torch.testing.assert_close(answer, _answer(pruned.model).detach(), rtol=1e-4, atol=1e-5)


def test_it_trains_and_the_dense_model_is_as_it_was(found: Any) -> None:
    for *_, reached, again, _ in found:
        assert reached
        assert again


def test_its_checkpoint_is_that_of_a_whole_model(found: Any, folder: Path, pruned: Any) -> None:
    loaded = dpf.from_pretrained(folder / "saved", _unet())
    torch.testing.assert_close(_answer(loaded), _answer(pruned.model), rtol=1e-4, atol=1e-5)
