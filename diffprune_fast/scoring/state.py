"""What scoring has added up so far, on disk, so that it goes on where it was stopped."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.state import read_state, write_state
from ..objective.loss import Objective
from ..objective.ranks import alike, rank_and_count, sampled, sampled_tensor, told_by_first_rank
from ..objective.shards import whole

# Seconds between two writes: what a kill costs at most, beside walking the loader again.
SECONDS = 30.0

# Of each weight's largest value: a basis of heads, computed again, differs by rounding; a step of training by more.
SAME_WEIGHTS = 1e-5


class State:
    """The stages of a scoring, ``"curve"``, ``"scores"`` and ``"damage"``, with sums over all ranks.

    The first rank reads and writes; without a path nothing is written. Sums are of whole micro-batches, which are the
    same on any number of ranks, so the number may change on the way.

    settings: all that the sums depend on, as plain values. model, batch: by which both are known again.

    Raises ValueError for a file that is of another scoring.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        settings: Mapping[str, Any],
        model: nn.Module,
        batch: Any,
        device: torch.device,
    ) -> None:
        self._path = None if path is None else Path(path)
        self._stages: dict[str, dict[str, Any]] = {}
        self._written = time.monotonic()
        if self._path is None:
            return
        weights = [sampled_tensor(whole(p)) for p in model.parameters()]
        self._about: dict[str, Any] = {
            "work": "scoring",
            "settings": dict(settings),
            "weights": weights,
            "batch": sampled(batch),
        }
        if rank_and_count()[0] == 0:
            self._stages = self._read(self._path)
        self._stages = told_by_first_rank(self._stages, device)

    def so_far(self, stage: str) -> Mapping[str, Any] | None:
        """What :meth:`note` was told last of a stage, before the break."""
        return self._stages.get(stage)

    @property
    def wanted(self) -> bool:
        """Whether there is anything to be noted for; the same on all ranks."""
        return self._path is not None

    def note(self, stage: str, *, now: bool = False, **values: Any) -> None:
        """Keep plain values and tensors; written if ``now``, or if the last write is some time ago."""
        self._stages[stage] = values
        if self._path is None or rank_and_count()[0] > 0:
            return
        if now or time.monotonic() - self._written >= SECONDS:
            write_state(self._path, {**self._about, "stages": self._stages})
            self._written = time.monotonic()

    def _read(self, path: Path) -> dict[str, dict[str, Any]]:
        state = read_state(path, self._about["settings"], "scoring")
        if state is None:
            return {}
        if not alike(self._about["weights"], state["weights"], SAME_WEIGHTS):
            raise ValueError(f"{path} is of a scoring of a model of other weights: remove it to begin anew")
        if not alike(self._about["batch"], state["batch"]):
            raise ValueError(
                f"{path} is of a scoring with a loader that begins with another batch: remove it to begin anew"
            )
        return dict(state["stages"])


def settings_of(objective: Objective, **more: Any) -> dict[str, Any]:
    """The objective and whatever else the sums depend on, as values that can be compared and kept."""
    tables = {name: getattr(objective, name) for name in ("signal", "sigma", "time")}
    return {
        "objective": objective.kind,
        "timesteps": objective.n_timesteps,
        "noise": [round(float(x.double().sum()), 6) for x in tables.values() if x is not None],
        **more,
    }
