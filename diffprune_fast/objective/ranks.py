"""The processes of torch.distributed that share the work: they begin it alike, and none is left waiting for another."""

from __future__ import annotations

import functools
import inspect
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from .nested import tensors_in

P = ParamSpec("P")
R = TypeVar("R")

# Seconds between two looks for news of other ranks.
_LOOK = 0.2
# Seconds that the first rank, which may keep the store with the news, stays after it failed.
_PATIENCE = 30.0
# Of a batch, so many values of each of so many tensors are compared, to 2 %: encoders round differently on other GPUs.
_VALUES, _TENSORS, _TOLERANCE = 64, 8, 0.02
# Without any of these there is no work to share, and a rank may be alone with it.
_DATA = ("loader", "calibration")
# Arguments that ranks may have of their own.
_OWN = ("progress", "backend")


class RankError(RuntimeError):
    """Another rank raised, or the ranks aren't at the same work."""


def rank_and_count() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) where torch.distributed is not in use."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def summed_over_ranks(values: Tensor) -> Tensor:
    """A copy of ``values``, added up over all ranks."""
    return reduced(values.clone())


def reduced(values: Tensor, op: str = "SUM") -> Tensor:
    """``values`` in place, added up over all ranks, or the ``"MIN"`` or ``"MAX"`` of them.

    Raises RankError within seconds where another rank raised instead of coming here.
    """
    if rank_and_count()[1] > 1:
        how = getattr(torch.distributed.ReduceOp, op)
        _awaited(torch.distributed.all_reduce(values, how, async_op=True))
    return values


def of_first_rank(values: Tensor) -> Tensor:
    """``values`` in place, as the first rank has them. Raises as :func:`reduced`."""
    if rank_and_count()[1] > 1:
        _awaited(torch.distributed.broadcast(values, 0, async_op=True))
    return values


def told_by_first_rank(value: Any, device: torch.device) -> Any:
    """What the first rank has, plain values and tensors of the CPU, on all of them; ``device``: where ranks meet.

    Raises as :func:`reduced`.
    """
    rank, ranks = rank_and_count()
    if ranks == 1:
        return value
    file = io.BytesIO()
    if rank == 0:
        torch.save(value, file)
    size = of_first_rank(torch.tensor([file.tell()], device=device))
    data = torch.frombuffer(bytearray(file.getvalue()) or bytearray(int(size)), dtype=torch.uint8).to(device)
    return torch.load(io.BytesIO(of_first_rank(data).cpu().numpy().tobytes()), weights_only=True)


def together(function: Callable[P, R]) -> Callable[P, R]:
    """For a function that all ranks call with the same arguments and end together; alone it is the function itself.

    Where versions, plans, seeds or other plain arguments differ, it raises RankError before the work begins. Where one
    rank raises, the others raise RankError with its message as soon as they wait for it.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if rank_and_count()[1] == 1 or _Work.current is not None:
            return function(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        if all(bound.arguments.get(name) is None for name in _DATA):
            return function(*args, **kwargs)
        bound.apply_defaults()
        about = {name: _plain(value) for name, value in bound.arguments.items() if name not in _OWN}
        versions = {"diffprune_fast": __version__, "torch": torch.__version__}
        work = _Work.current = _Work()
        try:
            work.compare({"function": function.__name__, **versions, **about})
            result = function(*args, **kwargs)
            work.end()
        except BaseException as error:
            work.fail(error)
            raise
        finally:
            _Work.current = None
        return result

    return run


def compare_batch(batch: Any) -> None:
    """Raise RankError where this rank's batch isn't that of the first one, inside :func:`together`."""
    if _Work.current is not None:
        _Work.current.compare_values(sampled(batch))


def meet() -> None:
    """Wait until all ranks are here, inside :func:`together`: before what waits for them without looking for news.

    Raises RankError where one raised. It goes through the store, so that the group can be used afterwards; a reduction
    that somebody left stays in it, which then is of no more use.
    """
    if _Work.current is not None:
        _Work.current.meet("met")


class _Work:
    """One call of a function that all ranks are in; news go through the store that the group was made with."""

    current: _Work | None = None
    _calls = 0

    def __init__(self) -> None:
        _Work._calls += 1
        self.rank, self.ranks = rank_and_count()
        store = torch.distributed.distributed_c10d._get_default_store()
        self._store = torch.distributed.PrefixStore(f"diffprune_fast/{_Work._calls}", store)
        self._told = 0

    def look(self) -> None:
        """Raise RankError if another rank has failed."""
        if self._store.check(["failed"]):
            self._store.add("seen", 1)
            raise RankError(self._store.get("failed").decode())

    def compare(self, about: Mapping[str, Any]) -> None:
        theirs = self._of_first(about)
        for name in about:
            if theirs.get(name) != about[name]:
                raise RankError(
                    f"rank {self.rank} has {name}={about[name]!r}, rank 0 {theirs.get(name)!r}: all ranks make the "
                    "same call"
                )
        self.meet("met")

    def compare_values(self, values: Sequence[Mapping[str, Any]]) -> None:
        theirs = self._of_first(values)
        if not alike(values, theirs):
            raise RankError(
                f"rank {self.rank}'s loader begins with another batch than rank 0's: give all ranks the same batches "
                "in the same order (no DistributedSampler), they share the work among them"
            )
        self.meet("met")

    def end(self) -> None:
        """Wait until all ranks are through."""
        try:
            self.meet("ended")
        except torch.distributed.DistNetworkError:
            return  # the first rank, whose process keeps the store, was through and has gone

    def meet(self, where: str) -> None:
        self._told += 1
        key = f"{where}/{self._told}"
        self._store.add(key, 1)
        self._until(lambda: self._store.add(key, 0) >= self.ranks)

    def fail(self, error: BaseException) -> None:
        """Tell the others, unless one of them was first."""
        try:
            if self._store.check(["failed"]):
                return
            self._store.set("failed", f"rank {self.rank} raised {type(error).__name__}: {error}")
            if self.rank == 0 and isinstance(error, Exception):
                until = time.monotonic() + _PATIENCE
                while self._store.add("seen", 0) < self.ranks - 1 and time.monotonic() < until:
                    time.sleep(_LOOK)
        except RuntimeError:  # the store went with the process that kept it
            return

    def _of_first(self, value: Any) -> Any:
        self._told += 1
        key = f"told/{self._told}"
        if self.rank == 0:
            self._store.set(key, json.dumps(value))
        self._until(lambda: self._store.check([key]))
        return json.loads(self._store.get(key).decode())

    def _until(self, there: Callable[[], bool]) -> None:
        while not there():
            self.look()
            time.sleep(_LOOK / 4)


def _awaited(work: Any) -> None:
    """Wait for a collective, with an eye on the news."""
    shared = _Work.current
    if shared is None:
        work.wait()
        return
    pause, looked = 1e-4, time.monotonic()
    while not work.is_completed():
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
        if time.monotonic() - looked > _LOOK:
            shared.look()
            looked = time.monotonic()
    try:
        work.wait()
    except RuntimeError as error:  # the connection to a rank that is gone
        time.sleep(_LOOK)
        shared.look()
        raise RankError(f"a rank is gone: {error}") from error


def _plain(value: Any) -> Any:
    """What can be compared of an argument; its type's name of anything else."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value if value is None or value == value else "nan"
    if isinstance(value, (list, tuple)) and len(value) < 1000 and all(isinstance(v, (int, float, str)) for v in value):
        return list(value)
    if isinstance(value, torch.dtype):
        return str(value)
    kind = type(value).__name__
    return [kind, value.hash] if isinstance(getattr(value, "hash", None), str) else kind


def sampled(batch: Any) -> list[dict[str, Any]]:
    """The shapes of a batch's tensors and some of their values, by which it can be known again."""
    return [sampled_tensor(x) for x in tensors_in(batch)[:_TENSORS]]


def sampled_tensor(tensor: Tensor) -> dict[str, Any]:
    """A tensor's shape and some values from all over it."""
    flat = tensor.detach().reshape(-1)
    at = torch.linspace(0, max(0, flat.numel() - 1), min(_VALUES, flat.numel()), dtype=torch.float64).long()
    values = flat[at.to(flat.device)]
    return {"shape": list(tensor.shape), "values": values.double().nan_to_num().cpu().tolist()}


def alike(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], tolerance: float = _TOLERANCE) -> bool:
    """Whether what was sampled of tensors is the same, up to ``tolerance`` of each one's largest value."""
    return len(a) == len(b) and all(_close(x, y, tolerance) for x, y in zip(a, b))


def _close(a: Mapping[str, Any], b: Mapping[str, Any], tolerance: float) -> bool:
    if a["shape"] != b["shape"]:
        return False
    x, y = np.array(a["values"]), np.array(b["values"])
    return not x.size or bool(np.abs(x - y).max() <= tolerance * np.abs(y).max())
