"""Checkpoints of the Hugging Face hub, which a function stands for."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from torch import nn

from diffprune_fast import CheckpointError, from_pretrained, score_and_prune


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository with a pruned model at its top and in a subfolder; every question to it is noted."""
    result = score_and_prune(dense(), None, criterion="magnitude", ratio=0.5, example_inputs=(torch.zeros(1, 4),))
    result.save_pretrained(tmp_path / "repository")
    shutil.copytree(tmp_path / "repository", tmp_path / "repository" / "unet")
    asked = []

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo_id, revision, allow_patterns))
        if repo_id != "user/repo":
            raise huggingface_hub.errors.LocalEntryNotFoundError("the hub can't be reached")
        return str(tmp_path / "repository")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return asked


def test_a_name_on_the_hub_is_fetched_without_code_or_pickles(hub):
    assert from_pretrained("user/repo", dense(), revision="v1")[0].out_features == 8
    assert from_pretrained("user/repo", dense(), subfolder="unet")[0].out_features == 8
    assert hub == [
        ("user/repo", "v1", ["*.json", "*.safetensors"]),
        ("user/repo", None, ["unet/*.json", "unet/*.safetensors"]),
    ]


def test_a_folder_goes_before_a_repository_of_its_name(hub, tmp_path):
    shutil.copytree(tmp_path / "repository", tmp_path / "user" / "repo")
    assert from_pretrained("user/repo", dense())[0].out_features == 8
    assert from_pretrained(Path("user"), dense(), subfolder="repo")[0].out_features == 8
    with pytest.raises(CheckpointError, match="has no revision 'v1'"):
        from_pretrained("user/repo", dense(), revision="v1")
    assert hub == []


def test_what_the_hub_does_not_give_is_named_with_the_reason(hub):
    with pytest.raises(CheckpointError, match=r"no folder user/other, and the hub .*can't be reached"):
        from_pretrained("user/other", dense())
