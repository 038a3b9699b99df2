"""Rotate the heads of a model's attentions, and prove that the model computes what it did."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..objective.batches import Batches
from ..objective.checks import check_batch, check_weights
from ..objective.isolation import stand_ins, unwrapped
from ..objective.loss import LossFunction, Objective, make_objective
from ..objective.nested import tensors_in
from ..objective.randomness import own_randomness
from ..objective.ranks import of_first_rank, rank_and_count, reduced, together
from ..plan.plan import Plan
from .bases import turning
from .calibration import draw
from .heads import HeadPair, find_heads
from .moments import Moments
from .weights import Turning, gram, put, turned

# How much the outputs may change, relative to their norm: rounding, in a network of many layers. For half precision
# two units in the last place: the weights are rounded once more.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}

Inputs = tuple[Any, Tensor, Tensor]


@dataclass(frozen=True)
class Rotation:
    """What :func:`rotate_heads` did.

    rotated: ``"<attention> qk"`` and ``"<attention> vo"`` of the heads that have a new basis. standing: the others, to
    the reason why they were left as they were. change: of the model's outputs, ``norm(new - old) / norm(old)``, None
    where nothing was rotated. samples: what the bases were calibrated with.

    It holds the weights as they were, on the host, until :meth:`forget`.
    """

    rotated: tuple[str, ...]
    standing: Mapping[str, str]
    change: float | None
    samples: int
    seed: int
    seconds: float
    _parameters: dict[str, nn.Parameter] = field(default_factory=dict, repr=False, compare=False)
    _originals: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def undo(self) -> None:
        """Put the weights back as they were, bit for bit, and forget them.

        Raises ValueError, having changed nothing, where a parameter has another shape by now.
        """
        for name, value in self._originals.items():
            if self._parameters[name].shape != value.shape:
                raise ValueError(f"{name} was pruned since its heads were rotated: its weights can't be put back")
        put(self._parameters, self._originals)
        self.forget()

    def forget(self) -> None:
        """Let go of the original weights; :meth:`undo` does nothing from here on."""
        self._originals.clear()
        self._parameters.clear()

    def __str__(self) -> str:
        how = "" if self.change is None else f", outputs changed by {self.change:.1e}"
        lines = [f"{len(self.rotated)} of {len(self.rotated) + len(self.standing)} sides of attentions rotated{how}"]
        return "\n".join([*lines, *(f"  {name} as it was: {why}" for name, why in self.standing.items())])


@together
def rotate_heads(
    model: nn.Module,
    plan: Plan,
    loader: Iterable[Any] | None,
    *,
    scheduler: Any = None,
    loss_fn: LossFunction | None = None,
    samples: int = 128,
    micro_batch: int = 32,
    seed: int = 0,
) -> Rotation:
    """Change the basis of every attention head so that its least needed directions become single dims.

    The model's function stays the same. Per head, queries ``q A`` and keys ``k A'^-1`` have the same products, for any
    ``A``, and so have values ``v B`` and an output projection ``B^-1 W``. ``A`` is such that the first dims approximate
    the head's products as well as any of that number can, on calibration samples; pruning then removes the others.
    Parameters are changed in place: the same objects, dtype, device and ``requires_grad``. What an optimiser or a
    moving average remembers of them is in the old basis.

    loader, scheduler, loss_fn, seed: as for :func:`score`. samples: calibration samples. In torch.distributed the ranks
    share the micro-batches.

    Heads that can't be rotated are left as they are, see :func:`find_heads`. The outputs are compared with those before
    on one micro-batch; where they differ by more than 1e-5 (float32), the attentions that differ on their own are
    put back, or else all. If this raises, the weights are as they were, bit for bit.

    Raises ValueError for an empty loader, or one that doesn't fit the model, NaN in images or weights;
    FloatingPointError for NaN or infinite activations.
    """
    begin = time.perf_counter()
    if samples < 1 or micro_batch < 1:
        raise ValueError(f"samples={samples}, micro_batch={micro_batch}: both are at least 1")
    model = unwrapped(model)
    device = check_weights(model)
    pairs, standing = find_heads(model, plan)
    if not pairs:
        return Rotation((), standing, None, 0, seed, time.perf_counter() - begin)
    if loader is None:
        raise ValueError("heads are rotated by what flows through them: give a loader")
    parameters = dict(model.named_parameters())
    objective = make_objective(model, scheduler, loss_fn).on(device)
    with own_randomness(seed, loader), torch.inference_mode(False), torch.no_grad(), _exact_products(device):
        batches = Batches(loader, lambda batch: check_batch(model, batch, loss_fn))
        inputs = draw(objective, batches, samples, micro_batch, seed, device)
        with stand_ins(model, ()):
            run = _Run(model, objective, seed)
            turnings = _calibrated(run, pairs, parameters, inputs, device)
            originals, rotated, change, failed = _committed(run, turnings, parameters)
    standing |= failed
    names = tuple(pair.name for pair, _, _ in rotated)
    kept = {n: parameters[n] for n in originals}
    return Rotation(names, standing, change, samples, seed, time.perf_counter() - begin, kept, originals)


class _Run:
    """Runs the model; its answers to the first micro-batch are what has to stay."""

    def __init__(self, model: nn.Module, objective: Objective, seed: int) -> None:
        self.model, self._objective, self._seed = model, objective, seed
        self._proof: Inputs | None = None
        self._before: list[Tensor] = []

    def first(self, inputs: Inputs) -> None:
        self._proof = inputs
        self._before = self.answers(inputs)

    def answers(self, inputs: Inputs) -> list[Tensor]:
        """What the model answers, and the losses; by the same random numbers whenever it is asked."""
        found: list[Tensor] = []

        def keep(_: nn.Module, args: Any, output: Any) -> None:
            found.extend(x.detach().clone() for x in tensors_in(output) if x.is_floating_point())

        handle = self.model.register_forward_hook(keep)
        try:
            with own_randomness(self._seed):
                found.append(self._objective.loss(self.model, *inputs, reduction="none").detach())
        finally:
            handle.remove()
        return found

    def change(self) -> float:
        """How much the answers differ from those before, the most on any rank."""
        worst = 0.0
        if self._proof is not None:
            for old, new in zip(self._before, self.answers(self._proof)):
                size, moved = float(old.double().norm()), float((new.double() - old.double()).norm())
                worst = max(worst, moved / size if size > 0 else float(moved > 0))
                worst = worst if new.isfinite().all() else float("inf")
        if rank_and_count()[1] > 1:
            found = torch.tensor(worst, device=next(self.model.parameters()).device)
            reduced(found, "MAX")
            worst = float(found)
        return worst


def _calibrated(
    run: _Run,
    pairs: Sequence[HeadPair],
    parameters: Mapping[str, nn.Parameter],
    inputs: Iterator[Inputs],
    device: torch.device,
) -> list[Turning]:
    rank, ranks = rank_and_count()
    with Moments(run.model, pairs, device) as moments:
        for k, one in enumerate(inputs):
            if k % ranks == rank:
                (run.first if k == rank else run.answers)(one)
                moments.end()
    turnings = []
    for i, pair in enumerate(pairs):
        grams = gram(parameters, pair.left), gram(parameters, pair.right)
        left, right = [*moments.of(i), grams[1]][:2]
        a, inverse = turning(left, right, *grams)
        if ranks > 1:  # machines of several kinds may round differently
            both = torch.stack([a, inverse]).to(device)
            of_first_rank(both)
            a, inverse = both.cpu()
        turnings.append((pair, a, inverse))
    return turnings


def _committed(
    run: _Run, turnings: Sequence[Turning], parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], Sequence[Turning], float | None, dict[str, str]]:
    """Put the new weights in place if the answers stay: all of them, or those that stay so alone, or none.

    Returns the weights as they were, what was rotated, the change and, by name, why others weren't.
    """
    originals = {n: parameters[n].detach().to("cpu", copy=True) for n in _names(turnings)}
    limit = max(TOLERANCE.get(p.dtype, 1e-5) for p in parameters.values() if p.is_floating_point())
    failed: dict[str, str] = {}

    def change(some: Sequence[Turning]) -> float:
        put(parameters, turned(parameters, some))
        return run.change()

    def sound(some: Sequence[Turning]) -> list[Turning]:
        """Those that leave the answers as they are, found by halving; the weights are as they were."""
        found = change(some)
        put(parameters, originals)
        if found <= limit:
            return list(some)
        if len(some) == 1:
            failed[some[0][0].name] = f"rotated, it would change the outputs by {found:.1e}"
            return []
        half = len(some) // 2
        return sound(some[:half]) + sound(some[half:])

    try:
        found, kept = change(turnings), list(turnings)
        if found > limit:
            put(parameters, originals)
            kept = sound(turnings)
            found = change(kept)
        if not kept or found > limit:
            put(parameters, originals)
            together = f"rotated together, they would change the outputs by {found:.1e}"
            return {}, [], None, {**{pair.name: together for pair, _, _ in turnings}, **failed}
        return {n: originals[n] for n in _names(kept)}, kept, found, failed
    except BaseException:
        put(parameters, originals)
        raise


def _names(turnings: Iterable[Turning]) -> list[str]:
    """Every parameter that a rotation changes, once."""
    return list(dict.fromkeys(p.parameter for pair, _, _ in turnings for p in (*pair.left, *pair.right)))


@contextmanager
def _exact_products(device: torch.device) -> Iterator[None]:
    """Single precision means single precision in here: TensorFloat-32 would drown what is compared."""
    if device.type != "cuda":
        yield
        return
    cudnn, before = torch.backends.cudnn, torch.get_float32_matmul_precision()
    flags = cudnn.flags(cudnn.enabled, cudnn.benchmark, cudnn.benchmark_limit, cudnn.deterministic, False)
    torch.set_float32_matmul_precision("highest")
    try:
        with flags:
            yield
    finally:
        torch.set_float32_matmul_precision(before)
