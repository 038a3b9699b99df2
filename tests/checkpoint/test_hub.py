"""Checkpoints of the Hugging Face hub, which a function stands for."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hub_cache import stand_in
from torch import nn

from diffprune_fast import CheckpointError, from_pretrained, score_and_prune


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository with a pruned model at its top and in a subfolder, beside what nobody asked for."""
    result = score_and_prune(dense(), None, criterion="magnitude", ratio=0.5, example_inputs=(torch.zeros(1, 4),))
    folder = tmp_path / "repository"
    result.save_pretrained(folder)
    shutil.copytree(folder, folder / "unet")
    (folder / "model.py").write_text("raise SystemExit")
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({}))
    (folder / "everything-8GB.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return stand_in(monkeypatch, tmp_path / "cache", repo=folder)


def test_a_name_on_the_hub_is_fetched_without_code_pickles_or_other_weights(hub):
    assert from_pretrained("user/repo", dense(), revision="v1")[0].out_features == 8
    assert hub.asked == [("user/repo", "v1")]
    assert hub.fetched("user/repo") == {"diffprune.json", "diffprune_model.safetensors"}
    assert from_pretrained("user/repo", dense(), subfolder="unet")[0].out_features == 8
    assert hub.asked[1:] == [("user/repo", None)]
    assert "unet/diffprune_model.safetensors" in hub.fetched("user/repo")


def test_a_folder_goes_before_a_repository_of_its_name(hub, tmp_path):
    shutil.copytree(tmp_path / "repository", tmp_path / "user" / "repo")
    assert from_pretrained("user/repo", dense())[0].out_features == 8
    assert from_pretrained(Path("user"), dense(), subfolder="repo")[0].out_features == 8
    with pytest.raises(CheckpointError, match="is a folder, which has no revision 'v1'"):
        from_pretrained("user/repo", dense(), revision="v1")
    assert hub.asked == []


def test_what_the_hub_does_not_give_is_named_with_the_reason(hub):
    with pytest.raises(CheckpointError, match=r"no folder user/other, and the hub .*can't be reached"):
        from_pretrained("user/other", dense())


def test_a_name_that_no_repository_can_have_is_not_asked_for(hub):
    with pytest.raises(CheckpointError, match=r"diffprune.json is missing"):
        from_pretrained("some/where/else", dense())
    with pytest.raises(CheckpointError, match=r"neither a folder nor a name on the hub .*'v1'"):
        from_pretrained("nowhere", dense(), revision="v1")
    assert hub.asked == []
