"""The estimators that draw fresh images, noise and timesteps for every sample, and stop when their halves agree."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..objective.batches import count
from ..objective.loss_run import LossRun
from ..objective.randomness import DRAWN_BY_LOSS
from ..objective.ranks import rank_and_count
from ..objective.shards import Shard
from ..ops.channel_scores import BoundScores
from ..plan.plan import Plan
from ..progress import bar
from .scores import keep_set_agreement
from .state import State
from .tables import UnitTable

# Gradients are turned into scores when this much of them has gathered: enough for one launch to be worth it.
BUCKET_BYTES = 32 << 20


# Micro-batches between two looks at the agreement. Fixed, whatever the number of ranks, so that all stop alike.
CHECK_EVERY = 8


MIN_BATCHES = 16


@dataclass(kw_only=True)
class Work(LossRun):
    """What every estimator needs: losses of the model with its stand-in parameters, and the plan of its units.

    parts: of a sharded model, what this rank has of each parameter.
    """

    plan: Plan
    parameters: Mapping[str, nn.Parameter]
    parts: Mapping[str, Shard] | None = None
    backend: str = "auto"

    def new_scores(self) -> Tensor:
        """``(n_units,)`` zeros, in double precision where the device has it."""
        return torch.zeros(self.plan.n_units, dtype=self.sum_dtype, device=self.device)


class Collector(Protocol):
    """Adds up micro-batches in two halves, odd and even. Adding waits for nothing; asking for sums looks at them.

    Asking raises FloatingPointError, naming the parameter, where a gradient was NaN or infinite.
    """

    def add(self, k: int, loss: Callable[[], Tensor]) -> None: ...

    def halves(self) -> Tensor:
        """``(2, n_units)``; what the two halves alone say."""
        ...

    def total(self) -> Tensor:
        """``(n_units,)``; what both say together."""
        ...


class MicroScores:
    """``sum over micro-batches of |theta * g|``; gradients are consumed as soon as backward has made them.

    Hooks gather gradients into buckets; a full bucket becomes unit scores and its memory is given back, so that the
    gradients of the whole model are never there at once. Micro-batches are kept until their scores were seen to be
    finite, so that one that isn't can be walked again.
    """

    def __init__(self, work: Work, table: UnitTable, element: str, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._work, self._table, self._element = work, table, element
        self._bucket_bytes = bucket_bytes
        self._hooks = GradientHooks(work.parameters)
        self._current = work.new_scores()
        self._halves = torch.stack([self._current, self._current])
        self._unseen: list[tuple[Tensor, Callable[[], Tensor]]] = []
        self._waiting: list[str] = []
        self._bytes = 0

    def add(self, k: int, loss: Callable[[], Tensor]) -> None:
        self._current.zero_()
        with self._hooks.calling(self._arrived):
            self._work.backward(loss())
            self._flush()
        self._work.of_all_shards(self._current)
        self._unseen.append((torch.isfinite(self._current).all(), loss))
        # "signed" scores are only added up within a micro-batch: the sum over micro-batches is of absolute values.
        self._halves[k % 2] += self._current.abs()

    def halves(self) -> Tensor:
        if self._unseen:
            finite = torch.stack([found for found, _ in self._unseen]).tolist()
            if not all(finite):
                self._blame(self._unseen[finite.index(False)][1])
            self._unseen.clear()
        return self._work.of_all_batches(self._halves)

    def total(self) -> Tensor:
        return self.halves().sum(0)

    def restore(self, halves: Tensor) -> None:
        """Begin with sums of before, those of all ranks together."""
        if self._work.sharing[0] == 0:
            self._halves.copy_(halves)

    def _arrived(self, name: str, p: Tensor) -> None:
        assert p.grad is not None
        self._waiting.append(name)
        self._bytes += p.grad.nbytes
        if self._bytes >= self._bucket_bytes:
            self._flush()

    def _flush(self) -> None:
        add_scores(self._current, self._work, self._table, self._waiting, self._element, again=True)
        for name in self._waiting:
            self._work.parameters[name].grad = None
        self._waiting, self._bytes = [], 0

    def _blame(self, loss: Callable[[], Tensor]) -> None:
        """Walk the same micro-batch again and name the first gradient in backward's order that is not finite."""
        bad: list[str] = []

        def look(name: str, p: Tensor) -> None:
            if p.grad is not None and not bool(torch.isfinite(p.grad).all()):
                bad.append(name)
            p.grad = None

        with self._hooks.calling(look):
            self._work.backward(loss())
        raise FloatingPointError(_not_finite(bad[0] if bad else "one parameter or its score"))


class MeanGradient:
    """``|theta * sum of g|``: the paper's formula on batches of mixed timesteps. Holds two sets of gradients."""

    def __init__(self, work: Work, table: UnitTable, element: str) -> None:
        self._work, self._table, self._element = work, table, element
        self._gradients: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})

    def add(self, k: int, loss: Callable[[], Tensor]) -> None:
        half = self._gradients[k % 2]
        for name, p in self._work.parameters.items():
            p.grad = half.get(name)
        self._work.backward(loss())
        half.update({name: p.grad for name, p in self._work.parameters.items() if p.grad is not None})

    def halves(self) -> Tensor:
        return torch.stack([self._scores(half) for half in self._gradients])

    def total(self) -> Tensor:
        even, odd = self._gradients
        both = {n: even[n] + odd[n] if n in even and n in odd else even.get(n, odd.get(n)) for n in {**even, **odd}}
        return self._scores({n: g for n, g in both.items() if g is not None})

    def _scores(self, gradients: Mapping[str, Tensor]) -> Tensor:
        for name, p in self._work.parameters.items():
            p.grad = gradients.get(name)
        return gathered_scores(self._work, self._table, self._element)


def until_agreed(
    work: Work,
    collector: Collector,
    *,
    allowed: np.ndarray,
    micro_batch: int,
    min_samples: int,
    max_samples: int,
    agreement: float,
    agreement_ratio: float,
    split_ranks: bool,
    state: State,
) -> tuple[np.ndarray, int, float | None]:
    """Feed micro-batches to ``collector`` until its halves' keep-sets agree twice running.

    At least ``min_samples`` and 16 micro-batches, at most ``max_samples``. Returns the scores per micro-batch,
    ``(n_units,)``; the samples used, of all ranks; the last agreement (None for a single micro-batch).

    state: goes on from there; the sums of "mean", gradients of the whole model, are not kept half-way.
    """
    most = max(1, -(-max_samples // micro_batch))
    least = min(most, max(MIN_BATCHES, -(-min_samples // micro_batch)))
    rank, ranks = work.sharing if split_ranks else (0, 1)
    samples, good, found, done, enough = 0, 0, None, 0, False
    before = state.so_far("scores")
    if before is not None:
        samples, good, found, done, enough = (before[x] for x in ("samples", "good", "found", "done", "enough"))
        work.batches.pass_over([micro_batch] * done)
        if "values" in before:
            return before["values"].numpy(), samples, found
        if isinstance(collector, MicroScores):
            collector.restore(before["halves"])
    show = work.progress and rank_and_count()[0] == 0
    with bar(desc="scoring", show=show, initial=samples, total=most * micro_batch, unit="sample") as shown:
        while done < most and not enough:
            k, done = done, done + 1
            batch, t, noise = work.draw(k, micro_batch, allowed)
            if k % ranks == rank:
                collector.add(k, partial(work.mean_loss, batch, t, noise, (DRAWN_BY_LOSS, 0, k)))
            samples += count(batch)
            shown.update(count(batch))
            if done % CHECK_EVERY and done != most:
                continue
            work.check_losses()
            if done > 1:
                halves = collector.halves()
                a, b = halves.double().cpu().numpy()
                found = keep_set_agreement(work.plan, a, b, agreement_ratio)
                shown.set_postfix(agreement=f"{found:.3f}")
                good = good + 1 if found >= agreement else 0
            enough = done >= least and good >= 2
            known: dict[str, Any] = {"samples": samples, "good": good, "found": found, "done": done, "enough": enough}
            if done > 1 and isinstance(collector, MicroScores):
                state.note("scores", **known, halves=halves)
        shown.total = shown.n
        total = collector.total().double().cpu().numpy() / done
    state.note("scores", now=True, **known, values=torch.from_numpy(total))
    return total, samples, found


def gathered_scores(work: Work, table: UnitTable, element: str) -> Tensor:
    """``(n_units,)`` scores of the gradients that the stand-ins hold; ``"signed"`` ones as absolute values.

    Raises FloatingPointError naming the parameter whose gradient is not finite.
    """
    scores = work.new_scores()
    there = [n for n in table.parameters if work.parameters[n].grad is not None]
    add_scores(scores, work, table, there, element)
    work.of_all_shards(scores)
    if not bool(torch.isfinite(scores).all()):
        bad = [n for n in there if not bool(torch.isfinite(work.parameters[n].grad).all())]  # type: ignore[arg-type]
        raise FloatingPointError(_not_finite(bad[0] if bad else "one parameter or its score"))
    return scores.abs()


def add_scores(
    scores: Tensor, work: Work, table: UnitTable, parameters: list[str], element: str, *, again: bool = False
) -> None:
    """Add what some parameters and their gradients say to ``scores``.

    again: it is done with these scores many times; what is the same then is kept with the bucket's table.
    """
    names, entries = table.subset(parameters)
    if not names:
        return

    def bound() -> BoundScores:
        thetas = [work.parameters[n].detach() for n in names]
        return entries.bind(scores, thetas, criterion=element, backend=work.backend)

    # what is bound holds its scores, so that no others come to lie at their address
    add = entries.cached((scores.data_ptr(), element), bound) if again else bound()
    add([work.parameters[n].grad for n in names])  # type: ignore[misc]


class GradientHooks:
    """Hooks on parameters, registered once and gone with this object: ``with hooks.calling(f):`` calls ``f(name,
    parameter)`` whenever a parameter's gradient is complete."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._now: list[Callable[[str, Tensor], None]] = []  # what is called; all that the hooks hold
        handles = [
            p.register_post_accumulate_grad_hook(partial(_tell, self._now, name)) for name, p in parameters.items()
        ]
        weakref.finalize(self, _remove, handles)

    @contextmanager
    def calling(self, call: Callable[[str, Tensor], None]) -> Iterator[None]:
        self._now.append(call)
        try:
            yield
        finally:
            self._now.clear()


def _tell(now: list[Callable[[str, Tensor], None]], name: str, p: Tensor) -> None:
    for call in now:
        call(name, p)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _not_finite(name: str) -> str:
    return (
        f"the gradient of {name} is NaN or infinite: try the model in single precision or autocast='bf16', "
        "and look for images that are out of range"
    )
