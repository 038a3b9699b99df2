"""Micro-batches from the user's loader."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scoring_models import images, tiny
from torch import Tensor

from diffprune_fast.objective.batches import Batches, count, repeated, replayed
from diffprune_fast.objective.checks import check_images, in_channels


def accept(_: Any) -> None:
    pass


def numbered(start: int, n: int) -> Tensor:
    return torch.arange(start, start + n).float().view(n, 1, 1)


def test_micro_batches_have_the_asked_size_and_lose_no_sample() -> None:
    batches = Batches([numbered(0, 5), numbered(5, 7), numbered(12, 2)], accept)
    taken = [batches.take(4).flatten().tolist() for _ in range(7)]
    assert [len(t) for t in taken] == [4] * 7
    assert [x for t in taken for x in t] == [float(i % 14) for i in range(28)]


def test_a_micro_batch_may_be_larger_than_the_whole_data() -> None:
    assert Batches([numbered(0, 3)], accept).take(8).flatten().tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_pairs_and_dicts_stay_together() -> None:
    loader = [{"images": numbered(i, 3), "name": [f"n{j}" for j in range(i, i + 3)]} for i in (0, 3)]
    batch = Batches(loader, accept).take(5)
    assert batch["images"].flatten().tolist() == [0, 1, 2, 3, 4]
    assert batch["name"] == ["n0", "n1", "n2", "n3", "n4"]
    pairs = [(numbered(i, 3), torch.arange(i, i + 3)) for i in (0, 3)]
    x, y = Batches(pairs, accept).take(4)
    assert x.flatten().tolist() == y.tolist() == [0, 1, 2, 3]


def test_token_positions_are_shared_by_all_samples() -> None:
    positions = torch.arange(3)
    batch = Batches([{"images": numbered(0, 3), "img_ids": positions}], accept).take(2)
    assert batch["images"].shape[0] == 2
    assert torch.equal(batch["img_ids"], positions)


def test_images_of_another_size_are_not_joined() -> None:
    batches = Batches([images(3), images(3)[..., :4, :4]], accept)
    assert [tuple(batches.take(4).shape) for _ in range(2)] == [(3, 3, 6, 6), (3, 3, 4, 4)]


def test_a_generator_is_seen_again_from_memory() -> None:
    batches = Batches((numbered(i, 2) for i in (0, 2)), accept)
    assert batches.take(6).flatten().tolist() == [0, 1, 2, 3, 0, 1]
    assert batches.take(4).flatten().tolist() == [2, 3, 0, 1]


def test_what_a_generator_leaves_in_memory_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffprune_fast.objective.batches.CACHE_BYTES", numbered(0, 4).nbytes)
    batches = Batches((numbered(i, 2) for i in (0, 2, 4)), accept)
    assert batches.take(6).flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert batches.take(6).flatten().tolist() == [0, 1, 2, 3, 0, 1]


def test_a_generator_goes_on_beyond_what_is_kept_whoever_walks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffprune_fast.objective.batches.CACHE_BYTES", numbered(0, 4).nbytes)
    replay = replayed(numbered(i, 2) for i in (0, 2, 4, 6))
    first = iter(replay)
    assert [next(first).flatten().tolist() for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert [x.flatten().tolist() for x in replay] == [[0, 1], [2, 3], [6, 7]]
    assert [x.flatten().tolist() for x in replay] == [[0, 1], [2, 3]]


def test_a_loader_that_runs_dry_is_an_error() -> None:
    class Once:
        def __init__(self) -> None:
            self.inner = iter([numbered(0, 2)])

        def __iter__(self) -> Iterator[Tensor]:
            return iter(list(self.inner))

    batches = Batches(Once(), accept)
    with pytest.raises(ValueError, match="nothing when it was walked a second time"):
        batches.take(4)


def test_an_empty_loader_is_an_error_at_once() -> None:
    with pytest.raises(ValueError, match="the loader is empty"):
        Batches([], accept)


@pytest.mark.parametrize("loader", [None, 3, "images", {"images": 1}])
def test_something_else_is_no_loader(loader: Any) -> None:
    with pytest.raises(TypeError, match="iterable of batches"):
        Batches(loader, accept)


def test_every_batch_is_checked_the_first_one_at_once() -> None:
    seen: list[int] = []
    batches = Batches([numbered(0, 2), numbered(2, 3)], lambda b: seen.append(count(b)))
    assert seen == [2]
    batches.take(4)
    assert seen == [2, 3]


def test_repeating_a_batch_repeats_every_row() -> None:
    batch = {"images": numbered(0, 2), "name": ["a", "b"], "scale": torch.tensor(3.0)}
    again = repeated(batch, 2)
    assert again["images"].flatten().tolist() == [0, 1, 0, 1]
    assert again["name"] == ["a", "b", "a", "b"]
    assert again["scale"] == 3


def test_wrong_channels_are_named() -> None:
    with pytest.raises(ValueError, match=r"takes images of 3 channels, the loader yields 4"):
        check_images(tiny(), images(2, channels=4))
    check_images(tiny(), images(2, channels=4), channels=False)


def test_channels_come_from_the_config_before_the_first_convolution() -> None:
    model = tiny()
    assert in_channels(model) == 3
    model.config = {"in_channels": 5}  # type: ignore[assignment]
    assert in_channels(model) == 5
    model.config = SimpleNamespace(in_channels=7)  # type: ignore[assignment]
    assert in_channels(model) == 7


def test_nan_and_integer_and_empty_images_are_named() -> None:
    bad = images(4)
    bad[2, 0, 1, 1] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinity in the loader's images \(positions \[2\] of a batch of 4"):
        check_images(tiny(), bad)
    with pytest.raises(ValueError, match=r"torch.uint8 images; give floats"):
        check_images(tiny(), torch.zeros(2, 3, 6, 6, dtype=torch.uint8))
    with pytest.raises(ValueError, match="empty batch"):
        check_images(tiny(), images(0))
