"""A model that FSDP2 has sharded is traced and scored from its shards, as the whole one on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from processes import run_ranks
from torch import Tensor

import diffprune_fast as dpf
from diffprune_fast.objective.shards import borrowed_shards
from diffprune_fast.scoring.scores import Scores

SCORING: dict[str, dict[str, Any]] = {
    "micro": {},
    "taylor": {"criterion": "taylor", "damage": False},
    "mean": {"estimator": "mean", "damage": False},
    "magnitude": {"criterion": "magnitude", "damage": False},
}


def unet() -> UNet2DModel:
    """Odd widths, so that shards are uneven and ranks lack some parameters; weights in which all groups matter."""
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
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.05)
    return model


def sharded(model: Any, mesh: Any = None) -> Any:
    from torch.distributed.fsdp import fully_shard

    for block in [*model.down_blocks, *model.up_blocks]:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(16, 1, 8, 8, generator=generator) * 2 - 1 for _ in range(3)]


def scored(model: Any, plan: dpf.Plan, how: str, **more: Any) -> Scores:
    options: dict[str, Any] = {"micro_batch": 8, "max_samples": 32, "progress": False, **SCORING[how], **more}
    return dpf.score(model, None if how == "magnitude" else batches(), plan, **options)


def broken_off(model: Any) -> bool:
    """Whether a model is as it was after a forward that raised half-way."""

    def fail(*_: Any) -> None:
        raise KeyError("half-way")

    images, t = batches()[0], torch.zeros(16, dtype=torch.long)
    before = model(images, t).sample.detach()
    handle = model.up_blocks[0].register_forward_pre_hook(fail)
    with pytest.raises(KeyError), borrowed_shards(model, ("conv_in.weight",)):
        model(images, t)
    handle.remove()
    shards = all(hasattr(p, "placements") for p in model.parameters())
    return shards and torch.allclose(model(images, t).sample, before, atol=1e-5)


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "shards"))
    model = sharded(unet())
    plan = dpf.trace(model)
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    frozen.grad = mine = torch.ones_like(frozen)
    model.train()
    found = {how: scored(model, plan, how) for how in SCORING}
    found["copies"] = scored(sharded(unet(), mesh), plan, "micro")
    kept = {
        "shards": all(hasattr(p, "placements") for p in model.parameters()),
        "frozen": not frozen.requires_grad,
        "gradients": frozen.grad is mine and all(p.grad is None for p in model.parameters() if p is not frozen),
        "mode": all(m.training for m in model.modules()),
    }
    kept["broken off"] = broken_off(model)
    scored(model, plan, "micro", checkpoint=f"{folder}/state", damage=False)
    said = {}
    for name, more in {"reference": {"estimator": "reference"}, "nan": {}}.items():
        if name == "nan" and rank == 1:
            with torch.no_grad():
                frozen.to_local().fill_(float("nan"))
        try:
            scored(model, plan, "micro", **more)
            said[name] = "nothing"
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    values = {how: (s.values, s.damage) for how, s in found.items()}
    torch.save((plan.hash, values, kept, said), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("sharded")
    run_ranks(rank_main, str(folder))
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[Any]:
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def plan() -> dpf.Plan:
    return dpf.trace(unet())


def test_its_plan_is_that_of_the_whole_model(found: Any, plan: dpf.Plan) -> None:
    assert [theirs for theirs, *_ in found] == [plan.hash, plan.hash]


@pytest.mark.parametrize("how", SCORING)
def test_its_scores_and_keep_set_are_those_of_the_whole_model(found: Any, plan: dpf.Plan, how: str) -> None:
    whole = scored(unet(), plan, how)
    for _, values, *_ in found:
        np.testing.assert_allclose(values[how][0], whole.values, rtol=1e-4, atol=1e-6 * whole.values.max())
        theirs = Scores(values[how][0], "micro", "diff-pruning", 0)
        a, b = (dpf.select(plan, scores, ratio=0.4).keep for scores in (theirs, whole))
        for name in b:
            np.testing.assert_array_equal(a[name], b[name])


def test_its_damage_is_that_of_the_whole_model(found: Any, plan: dpf.Plan) -> None:
    whole = scored(unet(), plan, "micro").damage
    assert whole is not None
    for _, values, *_ in found:
        np.testing.assert_allclose(values["micro"][1], whole, rtol=1e-4, atol=1e-6 * whole.max())


def test_copies_of_a_shard_count_once(found: Any) -> None:
    for _, values, *_ in found:
        for of_copies, of_shards in zip(values["copies"], values["micro"]):
            np.testing.assert_allclose(of_copies, of_shards, rtol=1e-4, atol=1e-6 * of_shards.max())


def test_it_is_left_as_it_was(found: Any) -> None:
    for *_, kept, _ in found:
        assert all(kept[what] for what in ("shards", "frozen", "gradients", "mode")), kept


def test_its_scoring_is_gone_on_with_on_a_whole_model(found: Any, folder: Path, plan: dpf.Plan) -> None:
    state = folder / "state"
    known = scored(unet(), plan, "micro", checkpoint=state, damage=False)
    np.testing.assert_allclose(known.values, found[0][1]["micro"][0], rtol=1e-12)


def test_a_forward_that_was_broken_off_leaves_no_trace(found: Any) -> None:
    for *_, kept, _ in found:
        assert kept["broken off"]


def test_what_needs_whole_weights_is_refused(found: Any) -> None:
    for *_, said in found:
        assert said["reference"].startswith("ValueError: estimator='reference' is for whole models")


def test_a_rank_with_bad_weights_takes_the_other_along(found: Any) -> None:
    assert found[1][3]["nan"].startswith("ValueError: conv_in.weight has")
    assert found[0][3]["nan"].startswith("RankError: rank 1 raised ValueError: conv_in.weight has")
