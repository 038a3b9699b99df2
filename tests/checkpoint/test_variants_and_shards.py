"""Checkpoints of several files: variants of the weights beside each other, weights in shards."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from safetensors import safe_open
from tiny_pipelines import made
from torch import nn

import diffprune_fast as dpf
from diffprune_fast import CheckpointError, from_pretrained
from diffprune_fast.checkpoint.manifest import CONFIG, MANIFEST, PRUNED_WEIGHTS, SIGNPOST, read_manifest, signed

SHARD = 30_000  # bytes


def pruned(**asked) -> dpf.PruneResult:
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()
    return dpf.score_and_prune(model, None, criterion="random", **asked)


@pytest.fixture(scope="module")
def result() -> dpf.PruneResult:
    return pruned(macs=0.6, round_to=4)


def assert_same(one: nn.Module, two: nn.Module) -> None:
    a, b = one.state_dict(), two.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def shards_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-of-*.safetensors"))


def test_weights_in_shards_come_back_and_no_shard_is_too_large(result, tmp_path):
    result.save_pretrained(tmp_path, max_shard_size=SHARD)
    shards = shards_in(tmp_path)
    assert len(shards) > 3
    for path in shards:
        with safe_open(path, framework="pt") as file:
            sizes = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118 (not a mapping)
        assert sum(sizes) <= SHARD or len(sizes) == 1
    assert not (tmp_path / PRUNED_WEIGHTS).exists()
    assert {path.name for path in shards} < read_manifest(tmp_path)["sha256"].keys()
    assert_same(from_pretrained(tmp_path), result.model)


def test_the_models_own_save_pretrained_takes_both(result, tmp_path):
    half = copy.deepcopy(result.model).half()
    half.save_pretrained(tmp_path, variant="fp16", max_shard_size=SHARD)
    assert all(path.name.startswith("diffprune_model.fp16-0000") for path in shards_in(tmp_path))
    assert_same(from_pretrained(tmp_path, variant="fp16"), half)


def test_saving_again_leaves_no_shard_of_before(result, tmp_path):
    result.save_pretrained(tmp_path, max_shard_size=SHARD)
    result.save_pretrained(tmp_path, max_shard_size=3 * SHARD)
    assert {int(path.stem[-5:]) for path in shards_in(tmp_path)} == {len(shards_in(tmp_path))}
    result.save_pretrained(tmp_path)
    assert shards_in(tmp_path) == []
    assert_same(from_pretrained(tmp_path), result.model)


def test_shards_of_what_a_plain_config_describes_are_read_by_its_class(tmp_path):
    plain = pruned(like={"block_out_channels": (8, 16)})
    plain.save_pretrained(tmp_path, max_shard_size=SHARD)
    assert len(shards_in(tmp_path)) > 1
    assert_same(UNet2DModel.from_pretrained(tmp_path), plain.model)
    assert_same(from_pretrained(tmp_path), plain.model)


def test_a_variant_lies_beside_the_plain_weights(result, tmp_path):
    half = copy.deepcopy(result.model).half()
    result.save_pretrained(tmp_path)
    half.save_pretrained(tmp_path, variant="fp16")
    assert {path.name for path in tmp_path.iterdir()} == {
        *(CONFIG, MANIFEST, PRUNED_WEIGHTS, SIGNPOST, "README.md"),
        *("diffprune.fp16.json", "diffprune_model.fp16.safetensors", f"{SIGNPOST.removesuffix('.json')}.fp16.json"),
    }
    assert_same(from_pretrained(tmp_path), result.model)
    assert_same(from_pretrained(tmp_path, variant="fp16"), half)
    for variant in (None, "fp16"):
        with pytest.raises(OSError, match=r"load this folder with diffprune_fast\.from_pretrained"):
            UNet2DModel.from_pretrained(tmp_path, variant=variant)


def test_a_variant_that_is_not_there_is_an_error_that_names_those_that_are(result, tmp_path):
    result.save_pretrained(tmp_path, variant="fp16")
    assert "variant='fp16'" in (tmp_path / "README.md").read_text()
    for variant in (None, "bf16"):
        with pytest.raises(CheckpointError, match=r"there is diffprune\.fp16\.json: give variant="):
            from_pretrained(tmp_path, variant=variant)
    for wrong in ("../fp16", "", "*"):
        with pytest.raises(ValueError, match="give letters and digits"):
            from_pretrained(tmp_path, variant=wrong)
        with pytest.raises(ValueError, match="give letters and digits"):
            result.save_pretrained(tmp_path / "other", variant=wrong)
    assert not (tmp_path / "other").exists()


@pytest.fixture
def sharded(result, tmp_path) -> Path:
    result.save_pretrained(tmp_path, max_shard_size=SHARD)
    return tmp_path


def test_a_missing_shard_is_named(sharded):
    shards_in(sharded)[1].unlink()
    with pytest.raises(CheckpointError, match=r"diffprune_model-00002-of-.* is missing"):
        from_pretrained(sharded)


def test_a_shard_of_another_model_is_refused(sharded):
    first = shards_in(sharded)[0]
    first.write_bytes(shards_in(sharded)[1].read_bytes())
    with pytest.raises(CheckpointError, match=r"00001-of-.*SHA-256 differs"):
        from_pretrained(sharded)


def test_a_shard_that_links_out_of_the_folder_is_refused(sharded):
    first, outside = shards_in(sharded)[0], sharded.parent / "outside.safetensors"
    shutil.move(first, outside)
    first.symlink_to(outside)
    with pytest.raises(CheckpointError, match="is a link to"):
        from_pretrained(sharded)


def test_a_manifest_can_name_no_shard_outside_of_the_folder(sharded):
    path, first = sharded / MANIFEST, shards_in(sharded)[0]
    known = json.loads(path.read_text())
    known["sha256"][f"../{first.name}"] = known["sha256"].pop(first.name)
    path.write_text(json.dumps(signed(known)))
    shutil.move(first, sharded.parent / first.name)
    with pytest.raises(CheckpointError, match="the weights lack"):
        from_pretrained(sharded)


def test_a_pipelines_pruned_component_is_saved_in_a_variant_and_shards(tmp_path):
    result = dpf.score_and_prune(made("ddpm"), None, criterion="magnitude", macs=0.6)
    result.save_pretrained(tmp_path, variant="fp16", max_shard_size=SHARD)
    assert shards_in(tmp_path / "unet")
    assert_same(dpf.pipeline_from_pretrained(tmp_path, variant="fp16").unet, result.model)
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_from_pretrained('.', variant='fp16')" in card
