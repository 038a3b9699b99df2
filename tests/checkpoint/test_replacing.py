"""Saving is old or new, never neither: broken off before every call that changes the disk."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from diffprune_fast import from_pretrained, score_and_prune
from diffprune_fast.checkpoint.manifest import BUFFERS, CONFIG, MANIFEST, PRUNED_WEIGHTS, WEIGHTS
from diffprune_fast.checkpoint.replacing import replace_files
from diffprune_fast.checkpoint.saving import files_of

FILES = files_of(None)

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "open", "shutil.rmtree")
INSIDE = ("os.remove", "os.rmdir")  # of names in a folder that is open


class Killed(BaseException):
    """From here on the process does nothing more to the disk."""


class Kills:
    """Stops at the ``at``-th change to the disk, and at every later one: what cleans up is dead as well."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.at = self.seen = 0
        sys.addaudithook(self)  # there is no way to take a hook away again

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder is None or event not in CHANGES or (event not in INSIDE and str(self.folder) not in str(args)):
            return
        if event == "open" and not (isinstance(args[1], str) and set(args[1]) & set("wax+")):
            return
        self.seen += 1
        if self.seen > self.at:
            raise Killed

    @contextmanager
    def after(self, at: int, folder: Path) -> Iterator[None]:
        self.at, self.seen, self.folder = at, 0, folder
        try:
            yield
        finally:
            self.folder = None


@pytest.fixture(scope="module")
def kills() -> Kills:
    return Kills()


def unet(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    known = {
        "sample_size": 8,
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    return UNet2DModel(**{**known, **changes})


def pruned(value: float, **changes: Any) -> nn.Module:
    """A pruned model whose weights are all ``value``."""
    model = score_and_prune(unet(**changes), None, criterion="magnitude", params=0.9, round_to=4).model
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
    return model


def value_in(folder: Path) -> float:
    values = {float(p.detach().view(-1)[0]) for p in from_pretrained(folder).parameters()}
    assert len(values) == 1
    return values.pop()


def litter(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


@pytest.mark.parametrize(
    ("changes", "shards"),
    [({}, None), ({"act_fn": "relu"}, None), ({}, 16_000)],
    ids=["the same config", "another config", "shards"],
)
def test_a_save_that_is_killed_leaves_the_old_model_or_the_new(
    changes: Any, shards: int | None, kills: Kills, tmp_path: Path
) -> None:
    old, new = pruned(1.0), pruned(2.0, **changes)
    seen = []
    for at in range(60):
        folder = tmp_path / str(at)
        old.save_pretrained(folder)
        config = (folder / CONFIG).read_bytes()
        ended = False
        with kills.after(at, folder):
            try:
                new.save_pretrained(folder, max_shard_size=shards)
                ended = True
            except Killed:
                pass
        seen.append(value_in(folder))
        if (folder / WEIGHTS).exists() and (folder / MANIFEST).exists() and not changes:
            assert (folder / CONFIG).read_bytes() == config  # diffusers' own reader finds a whole set too
        old.save_pretrained(folder)  # and the next save works, and cleans up
        assert (value_in(folder), litter(folder)) == (1.0, [])
        if ended:
            break
    assert ended
    assert seen == sorted(seen)
    assert set(seen) == {1.0, 2.0}
    assert seen.count(2.0) > 3  # also between the moves


def test_readers_by_the_config_never_find_weights_of_another(kills: Kills, tmp_path: Path) -> None:
    """At every moment that a save may end at, a config has its own weights or none."""
    for at in range(40):
        folder = tmp_path / str(at)
        write(folder, "old")
        with kills.after(at, folder):
            try:
                write(folder, "new")
                break
            except Killed:
                pass
        found = {name: (folder / name).read_text() for name in (CONFIG, WEIGHTS) if (folder / name).exists()}
        assert len(set(found.values())) == 1, (at, found)
    assert at > 6


def write(folder: Path, content: str, names: tuple[str, ...] = (CONFIG, MANIFEST, WEIGHTS)) -> None:
    replace_files(folder, FILES, lambda staged: [(staged / n).write_text(content) for n in names] and None)


def test_what_the_new_set_lacks_goes_and_what_others_put_there_stays(tmp_path: Path) -> None:
    write(tmp_path, "old", (CONFIG, MANIFEST, WEIGHTS, BUFFERS))
    (tmp_path / "README.md").write_text("mine")
    write(tmp_path, "new", (CONFIG, MANIFEST, PRUNED_WEIGHTS))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([CONFIG, MANIFEST, PRUNED_WEIGHTS, "README.md"])


@pytest.mark.parametrize("call", ["os.fsync", "os.rename", "pathlib.Path.rename", "tempfile.mkdtemp"])
def test_an_error_of_the_disk_before_the_commit_changes_nothing(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "old")

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(call, full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, "new")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == dict.fromkeys((CONFIG, MANIFEST, WEIGHTS), "old")


def test_a_first_save_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    def fails(_: Path) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        replace_files(tmp_path / "new", FILES, fails)
    assert os.listdir(tmp_path) == []
