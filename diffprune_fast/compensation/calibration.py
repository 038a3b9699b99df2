"""What both models are run on: inputs drawn once, the same for the dense and the pruned model, others held back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..objective.batches import Batches, count, join, part
from ..objective.checks import check_batch
from ..objective.image_range import check_range_by_loss
from ..objective.isolation import stand_ins
from ..objective.loss import LossFunction, dtype_of, images_of, make_objective
from ..objective.loss_run import precision, sum_dtype
from ..objective.nested import map_tensors, moved, tensors_in
from ..objective.randomness import early_timesteps, generator_for, own_randomness, stratified
from ..objective.ranks import rank_and_count, reduced

# Places in the seed's tree, beside those of scoring.
SAMPLES, POSITIONS = 40, 41

Forward = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Calibration:
    """Runs of a model.

    samples: how many inputs all ranks have together. start, stop: those of this rank. run: the forward of a model on
    all of this rank's, at once. one: the same on a single one. loss: a model's loss on samples that ``run`` doesn't
    see, all ranks' together. measure: what ``loss`` is.
    """

    samples: int
    start: int
    stop: int
    run: Forward
    one: Forward
    loss: Callable[[nn.Module], float]
    measure: str = "loss"


@contextmanager
def asleep(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, its parameters out of reach behind stand-ins that share their memory."""
    with stand_ins(model, ()):
        yield


def drawn(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    scheduler: Any,
    loss_fn: LossFunction | None,
    samples: int,
    held_back: int,
    seed: int,
    autocast: torch.dtype | None,
    device: torch.device,
) -> Calibration:
    """Images of the loader at timesteps that favour the less noisy ones, one noise each; as the model was trained.

    Raises ValueError or TypeError for a loader that doesn't fit the model.
    """
    objective = make_objective(model, scheduler, loss_fn).on(device)
    with own_randomness(seed, loader):
        batches = Batches(loader, lambda b: check_batch(model, b, loss_fn))
        check_range_by_loss(model, objective, batches.first)
        batch = _taken(batches, samples + held_back)
    found = count(batch)
    samples = min(samples, max(1, found - found // 3))
    rank, ranks = rank_and_count()
    _check_share(samples, ranks)
    noise = objective.noise(batch, generator_for(seed, SAMPLES, 0))
    # Solved where the loss is steep, judged as the model is trained: at all timesteps alike.
    solved = early_timesteps(objective.n_timesteps, samples, generator_for(seed, SAMPLES, 1))
    judged = stratified(np.arange(objective.n_timesteps), found - samples, generator_for(seed, SAMPLES, 2))
    t = torch.cat([solved, judged])
    start, stop = _share(samples, rank, ranks)

    def losses(model: nn.Module, start: int, stop: int) -> Tensor:
        rows = slice(start, stop)
        with own_randomness(seed), precision(device, autocast):
            return objective.loss(
                model,
                moved(part(batch, start, stop), device),
                t[rows].to(device),
                noise[rows].to(device),
                reduction="none",
            )

    def loss(model: nn.Module) -> float:
        first, last = _share(found - samples, rank, ranks) if found > samples else _share(samples, rank, ranks)
        offset = samples if found > samples else 0
        value = losses(model, offset + first, offset + last).double().mean().item() if last > first else 0.0
        return _mean_over_ranks(value, last - first, device)

    return Calibration(
        samples, start, stop, lambda m: losses(m, start, stop), lambda m: losses(m, start, start + 1), loss
    )


def called(
    dense: nn.Module,
    calls: Iterable[Any],
    *,
    seed: int,
    autocast: torch.dtype | None,
    device: torch.device,
) -> Calibration:
    """Forward calls of a model of one's own: tuples of positional arguments, dicts of named ones, or pairs of both.

    A third of the samples is held back; a model's loss is the squared difference of its outputs to the dense model's,
    relative to the squares of those.

    Raises ValueError for no call, or calls whose inputs can't be put together as one batch.
    """
    args, kwargs = _joined([_split(call) for call in calls])
    n = len(images_of([args, kwargs]))
    samples = max(1, n - n // 3)
    rank, ranks = rank_and_count()
    _check_share(samples, ranks)
    start, stop = _share(samples, rank, ranks)

    def outputs(model: nn.Module, start: int, stop: int) -> list[Tensor]:
        a, k = moved(_rows([args, kwargs], n, start, stop), device)
        dtype = dtype_of(model)
        a, k = map_tensors([a, k], lambda x: x.to(dtype) if x.is_floating_point() else x)
        with own_randomness(seed), precision(device, autocast):
            found = model(*a, **k)
        return [x for x in tensors_in(_plain(found)) if x.is_floating_point()]

    first, last = (samples, n) if n > samples else (0, samples)
    with asleep(dense):
        wanted = outputs(dense, first, last)
    size = sum(x.double().square().sum().item() for x in wanted)

    def loss(model: nn.Module) -> float:
        error = sum(
            (a.double() - b.double()).square().sum().item() for a, b in zip(outputs(model, first, last), wanted)
        )
        return error / max(size, torch.finfo(torch.float64).tiny)

    return Calibration(
        samples,
        start,
        stop,
        lambda m: outputs(m, start, stop),
        lambda m: outputs(m, start, start + 1),
        loss,
        "relative output error",
    )


def _taken(batches: Batches, size: int) -> Any:
    """About ``size`` samples as one batch: of images of several sizes those that go together with the first."""
    batch = batches.take(size)
    for _ in range(size):
        if count(batch) >= size:
            break
        more = join(batch, batches.take(size - count(batch)))
        batch = batch if more is None else more
    return batch


def _split(call: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(call, Tensor):
        return (call,), {}
    if isinstance(call, Mapping):
        return (), dict(call)
    if isinstance(call, (tuple, list)):
        if len(call) == 2 and isinstance(call[0], (tuple, list)) and isinstance(call[1], Mapping):
            return tuple(call[0]), dict(call[1])
        return tuple(call), {}
    raise TypeError(
        f"calibration yields {type(call).__name__}; give tuples of positional arguments, dicts of named ones, or "
        "((…), {…}) pairs of both"
    )


def _joined(calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not calls:
        raise ValueError("calibration is empty: give at least one forward call")
    args, kwargs = calls[0]
    for more in calls[1:]:
        both = join([list(args), kwargs], [list(more[0]), more[1]])
        if both is None:
            raise ValueError(
                "the calls of calibration can't be put together as one batch: give inputs of the same sizes, apart "
                "from the number of samples"
            )
        args, kwargs = tuple(both[0]), both[1]
    return args, kwargs


def _rows(value: Any, n: int, start: int, stop: int) -> Any:
    return map_tensors(value, lambda x: x[start:stop] if x.ndim and len(x) == n else x)


def _plain(found: Any) -> Any:
    return found if isinstance(found, (Tensor, Mapping, list, tuple)) else vars(found)


def _share(n: int, rank: int, ranks: int) -> tuple[int, int]:
    return n * rank // ranks, n * (rank + 1) // ranks


def _check_share(samples: int, ranks: int) -> None:
    if samples < ranks:
        raise ValueError(f"{samples} calibration samples for {ranks} ranks: each needs at least one")


def _mean_over_ranks(value: float, weight: int, device: torch.device) -> float:
    if rank_and_count()[1] == 1:
        return value
    both = torch.tensor([value * weight, weight], dtype=sum_dtype(device), device=device)
    reduced(both)
    return float(both[0] / both[1])
