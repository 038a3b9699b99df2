"""A scoring that is stopped at any moment goes on and ends with the same scores, on any number of ranks."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import new_process, run_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader

import diffprune_fast.scoring.state as state_module
from diffprune_fast import score, trace
from diffprune_fast.scoring.scores import Scores

# Of the curve, of 24 micro-batches and of the draws of damage: 69 calls of the loss.
OPTIONS: dict[str, Any] = {"micro_batch": 4, "max_samples": 96, "agreement": 1.0, "progress": False}


class Stop(Exception):
    pass


class Model(nn.Module):
    """With dropout that evaluation mode doesn't turn off: it draws from the global generator."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = torch.nn.functional.dropout(self.first(sample), 0.2, training=True)
        return self.last(torch.tanh(h) * (1 + timestep[:, None] / 1000))


def loader() -> DataLoader:
    """Shuffled anew in every pass of three batches; every sample is changed at random when it is read."""
    data = torch.rand(24, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(data, 8, shuffle=True, collate_fn=lambda x: torch.stack(x) + 0.1 * torch.rand(8, 6))


def run(
    path: Path | str | None, *, stop_in: int | None = None, how: str = "raise", seed: int = 0, **more: Any
) -> Scores:
    """A scoring whose loss stops everything at its ``stop_in``-th call."""
    model, calls = Model(seed), []

    def loss(model: nn.Module, batch: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        calls.append(0)
        if len(calls) == stop_in:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise Stop
        return (model(batch + t[:, None] / 1000 * noise, t) - noise).square().mean(1)

    plan = trace(model, (torch.zeros(1, 6), torch.zeros(1)))
    found = score(model, loader(), plan, loss_fn=loss, checkpoint=path, **{**OPTIONS, **more})
    found.__dict__["calls"] = len(calls)
    return found


def check_same(found: Scores, unbroken: Scores) -> None:
    np.testing.assert_allclose(found.values, unbroken.values, rtol=1e-5)
    np.testing.assert_allclose(found.damage, unbroken.damage, rtol=1e-5)  # type: ignore[arg-type]
    assert (found.samples, found.agreement) == (unbroken.samples, unbroken.agreement)


@pytest.fixture(scope="module")
def unbroken() -> Scores:
    return run(None)


@pytest.fixture(autouse=True)
def every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "SECONDS", 0.0)


@pytest.mark.parametrize("stops", [(3,), (31, 20), (47, 2), (66, 1, 5)], ids=str)
def test_however_often_it_stops_it_ends_with_the_same_scores(
    tmp_path: Path, unbroken: Scores, stops: tuple[int, ...]
) -> None:
    """In the curve, in the scores, between both and in the damage."""
    for stop in stops:
        with pytest.raises(Stop):
            run(tmp_path / "state", stop_in=stop)
    found = run(tmp_path / "state")
    check_same(found, unbroken)
    assert found.calls < unbroken.calls or stops == (3,)  # type: ignore[attr-defined]


def test_a_finished_scoring_is_read_and_not_done_again(tmp_path: Path, unbroken: Scores) -> None:
    run(tmp_path / "state")
    found = run(tmp_path / "state", stop_in=1)
    check_same(found, unbroken)
    np.testing.assert_array_equal(found.curve.losses, unbroken.curve.losses)  # type: ignore[union-attr]


@pytest.mark.parametrize("estimator", ["mean", "reference-quad"])
def test_of_other_estimators_what_is_through_is_kept(tmp_path: Path, estimator: str) -> None:
    whole = run(None, estimator=estimator)
    with pytest.raises(Stop):
        run(tmp_path / "state", estimator=estimator, stop_in=whole.calls - 2)  # type: ignore[attr-defined]
    found = run(tmp_path / "state", estimator=estimator)
    check_same(found, whole)
    assert found.calls <= 24  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"micro_batch": 8}, "of a scoring with estimator="),
        ({"threshold": 0.2}, "threshold=0.05, not threshold=0.2: remove it"),
        ({"seed": 1}, "a model of other weights"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_the_state_of_another_scoring_is_refused(tmp_path: Path, other: dict[str, Any], words: str) -> None:
    with pytest.raises(Stop):
        run(tmp_path / "state", stop_in=40)
    with pytest.raises(ValueError, match=words):
        run(tmp_path / "state", **other)


def test_the_state_of_another_plan_or_other_images_and_other_files_are_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "state", Model()
    with pytest.raises(Stop):
        run(path, stop_in=40)
    plan = trace(model, (torch.zeros(1, 6), torch.zeros(1)))

    def loss(model: nn.Module, batch: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return model(batch, t).square().mean(1)

    with pytest.raises(ValueError, match="begins with another batch"):
        score(model, [torch.ones(8, 6)], plan, loss_fn=loss, checkpoint=path, **OPTIONS)
    wide = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6))
    with pytest.raises(ValueError, match="plan="):
        score(
            *(wide, loader(), trace(wide, (torch.zeros(1, 6),))),
            **{"loss_fn": lambda m, x, t, n: m(x).square().mean(1), "checkpoint": path, **OPTIONS},
        )
    torch.save({"format": 1, "settings": {}}, path)
    with pytest.raises(ValueError, match="no scoring's state"):
        run(path)


def _rank_main(rank: int, ranks: int, folder: str, stop_in: int | None) -> None:
    torch.set_num_threads(1)
    state_module.SECONDS = 0.0
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/{stop_in}", rank=rank, world_size=ranks)
    try:
        found = run(f"{folder}/state", stop_in=stop_in if rank == 1 else None, how="kill")
    except RuntimeError as error:
        Path(f"{folder}/said").write_text(f"{type(error).__name__}: {error}")
        return
    torch.save((torch.from_numpy(found.values), torch.from_numpy(found.damage)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_a_job_of_two_ranks_goes_on_after_one_was_killed_and_on_one_rank_too(tmp_path: Path, unbroken: Scores) -> None:
    ranks = [new_process(_rank_main, rank, 2, str(tmp_path), 33) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in reversed(ranks):
        process.join()
    assert ranks[1].exitcode == -signal.SIGKILL
    assert (tmp_path / "said").read_text().startswith("RankError: ")
    check_same(run(_copied(tmp_path / "state")), unbroken)
    run_ranks(_rank_main, 2, str(tmp_path), None)
    for rank in range(2):
        values, damage = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        np.testing.assert_allclose(values, unbroken.values, rtol=1e-5)
        np.testing.assert_allclose(damage, unbroken.damage, rtol=1e-5)  # type: ignore[arg-type]


def _copied(path: Path) -> Path:
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    return copy
