"""Damaged checkpoints: every one is a CheckpointError, in seconds, before a model is built from it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file

from diffprune_fast import CheckpointError, from_pretrained, score_and_prune
from diffprune_fast.checkpoint.building import check_positions
from diffprune_fast.checkpoint.manifest import CONFIG, MANIFEST, PRUNED_WEIGHTS, _sha256, signed

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("whole")
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
    )
    score_and_prune(unet, None, criterion="magnitude", macs=0.5, ranking="global", round_to=1).save_pretrained(folder)
    return folder


@pytest.fixture
def saved(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "pruned"))


@contextmanager
def seconds(most: int) -> Iterator[None]:
    """An error in place of a wait without end."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {most} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(most)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def manifest(change: Callable[[dict[str, Any]], Any], sign: bool = True) -> Damage:
    def damage(folder: Path) -> None:
        known = json.loads((folder / MANIFEST).read_text())
        change(known)
        (folder / MANIFEST).write_text(json.dumps(signed(known) if sign else known))

    return damage


def config(sign: bool = True, **changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        if sign:
            manifest(lambda m: m["sha256"].update({CONFIG: _sha256(path)}))(folder)

    return damage


def text(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)


def fifo(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def folder_for(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def nan(folder: Path) -> None:
    weights = load_file(folder / PRUNED_WEIGHTS)
    next(iter(weights.values())).view(-1)[0] = torch.nan
    save_file(weights, folder / PRUNED_WEIGHTS)
    manifest(lambda m: m["sha256"].update({PRUNED_WEIGHTS: _sha256(folder / PRUNED_WEIGHTS)}))(folder)


DEEP = '{"a":' * 100_000

DAMAGES: dict[str, tuple[Damage, str]] = {
    "another eps": (config(sign=False, norm_eps=1e-3), "config.json is not the file"),
    "another activation": (config(sign=False, act_fn="relu"), "config.json is not the file"),
    "other norm groups": (config(sign=False, norm_num_groups=2), "config.json is not the file"),
    "another number of groups": (manifest(lambda m: m["attributes"].update({"conv_in.groups": 1}), False), "checksum"),
    "no checksum": (manifest(lambda m: m.pop("checksum"), sign=False), "checksum"),
    "no checksum of the config": (manifest(lambda m: m["sha256"].pop(CONFIG)), "config.json is not the file"),
    "NaN weights": (nan, "has NaN or infinite values"),
    "a deep manifest": (text(MANIFEST, DEEP), "nested too deep"),
    "a deep config": (text(CONFIG, DEEP), "nested too deep"),
    "a manifest that never ends": (fifo(MANIFEST), "no ordinary file"),
    "a config that never ends": (fifo(CONFIG), "no ordinary file"),
    "weights that never end": (fifo(PRUNED_WEIGHTS), "no ordinary file"),
    "a folder for weights": (folder_for(PRUNED_WEIGHTS), "no ordinary file"),
    "more layers than time": (config(layers_per_block=10**7), "more than .* modules"),
    "a size without end": (config(sample_size=10**30), "no model is as large"),
    "a format of another type": (manifest(lambda m: m.update(format=True)), "format True"),
    "a list for a name": (manifest(lambda m: m["tied"].update({"conv_in.weight": ["a"]})), "can't be loaded"),
    "a dropped block that is none": (manifest(lambda m: m.update(dropped={"conv_in": 3})), "names no argument"),
    "a table of nothing": (manifest(lambda m: m["tables"].update({"conv_in": []})), "table of conv_in"),
    "a table with no columns": (manifest(lambda m: m["tables"].update({"conv_in": [4, []]})), "table of conv_in"),
    "a width that overflows": (manifest(lambda m: m["tables"].update({"conv_in": [2**70, [0, 2**70]]})), "table|load"),
    "keep-sets that fill the memory": (
        manifest(lambda m: m["keep"].update({f"x{i}": [0, 10] for i in range(10)} | {"y": [0, 2**30]})),
        "more units than there are channels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(name: str, saved: Path) -> None:
    damage, words = DAMAGES[name]
    damage(saved)
    with pytest.raises(CheckpointError, match=words), seconds(60):
        from_pretrained(saved)


def test_a_table_of_positions_without_end_is_refused() -> None:
    known = {"num_attention_heads": 16, "attention_head_dim": 72, "patch_size": 2, "sample_size": 128}
    check_positions(known)
    for name in ("sample_size", "pos_embed_max_size"):
        with pytest.raises(CheckpointError, match=r"table of .* positions"):
            check_positions({**known, name: 1 << 20})


def test_a_checkpoint_of_the_first_format_loads_with_a_note(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    def older(known: dict[str, Any]) -> None:
        known.update(format=1)
        del known["checksum"], known["sha256"][CONFIG]

    manifest(older, sign=False)(saved)
    with caplog.at_level(logging.WARNING):
        from_pretrained(saved)
    assert "without checksums" in caplog.text


def test_weights_that_are_replaced_on_purpose_must_be_numbers(saved: Path) -> None:
    nan(saved)
    with pytest.raises(CheckpointError, match="NaN"):
        from_pretrained(saved, verify=False)


def test_a_model_that_went_wrong_is_not_saved(saved: Path, tmp_path: Path) -> None:
    model = from_pretrained(saved)
    with torch.no_grad():
        model.conv_in.weight[0] = torch.inf
    with pytest.raises(CheckpointError, match=r"conv_in\.weight has NaN or infinite"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
