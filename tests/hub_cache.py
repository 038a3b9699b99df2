"""The hub, which a function stands for: it copies what is asked for of a folder as the hub's client lays it down."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects


class Hub:
    """asked: repository and revision of every question. repositories: their names, and the folders they are made of."""

    def __init__(self, cache: Path, repositories: Mapping[str, Path]) -> None:
        self.cache, self.repositories = cache, dict(repositories)
        self.asked: list[tuple[str, str | None]] = []

    def snapshot_download(self, repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append((repo_id, revision))
        if repo_id not in self.repositories:
            raise huggingface_hub.errors.LocalEntryNotFoundError("the hub can't be reached")
        source, place = self.repositories[repo_id], self.cache / f"models--{repo_id.replace('/', '--')}"
        snapshot, blobs = place / "snapshots" / "0123", place / "blobs"
        for path in (snapshot, blobs):
            path.mkdir(parents=True, exist_ok=True)
        names = [path.relative_to(source).as_posix() for path in sorted(source.rglob("*")) if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            blob, link = blobs / name.replace("/", "--"), snapshot / name
            if not link.exists():
                shutil.copy(source / name, blob)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(os.path.relpath(blob, link.parent))
        return str(snapshot)

    def fetched(self, repo_id: str) -> set[str]:
        snapshot = self.cache / f"models--{repo_id.replace('/', '--')}" / "snapshots" / "0123"
        return {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}


def stand_in(patch: pytest.MonkeyPatch, cache: Path, **repositories: Path) -> Hub:
    """A hub that has ``user/<name>`` for every name."""
    hub = Hub(cache, {f"user/{name}": folder for name, folder in repositories.items()})
    patch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub
