"""Making up for the channels that are gone: :func:`compensate`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..choices import CompensationMode, check_choice
from ..objective.checks import check_weights
from ..objective.isolation import unwrapped
from ..objective.loss import LossFunction
from ..objective.ranks import rank_and_count, together
from ..progress import bar
from ..scoring.checks import AUTOCAST
from .calibration import Calibration, asleep, called, drawn
from .consumers import Consumer, Kept, consumers, norms
from .estimates import Estimate, agreed, decided, means_of, measured
from .record import record
from .solve import Solver

SAMPLES = 128
HELD_BACK = 64


@dataclass(frozen=True)
class Compensation:
    """What compensation did.

    dense, sliced, compensated: the models' loss on samples that nothing was solved from (``measure`` says what the loss
    is). helped: whether it is lower, and so whether the model has the new weights. layers: the layers that were solved.
    alone: layers that lost inputs and keep their weights, with the reason. mode: ``"full"`` or ``"channels"``, why:
    what decided. samples: how many it took. seconds: how long. bytes: the estimate of the extra memory, the forward's
    activations among it.
    """

    dense: float
    sliced: float
    compensated: float
    helped: bool
    layers: tuple[str, ...] = ()
    alone: Mapping[str, str] = field(default_factory=dict)
    mode: str = "full"
    why: str = ""
    measure: str = "loss"
    samples: int = 0
    seconds: float = 0.0
    bytes: int = 0

    def __str__(self) -> str:
        if not self.layers:
            line = "compensation: no layer was solved"
        else:
            line = (
                f"{self.measure}: dense {self.dense:.4g}, sliced {self.sliced:.4g}, "
                f"compensated {self.compensated:.4g}{'' if self.helped else ' (not lower: the sliced weights stay)'}; "
                f"{len(self.layers)} layers, {self.mode} ({self.why}), {self.samples} samples, {self.seconds:.1f} s"
            )
        return "\n".join([line, *[f"left alone: {name}, {reason}" for name, reason in self.alone.items()]])


@together
def compensate(
    pruned: nn.Module,
    dense: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    kept: Kept,
    scheduler: Any = None,
    loss_fn: LossFunction | None = None,
    mode: CompensationMode = "auto",
    samples: int | None = None,
    seed: int = 0,
    ridge: float = 1e-3,
    calibration: Iterable[Any] | None = None,
    autocast: str | torch.dtype | None = None,
    progress: bool = True,
) -> Compensation:
    """Solve the layers of a pruned model that lost inputs, so that they answer as the dense model's do. In place.

    Layer after layer, in the order in which the pruned model calls them, the weights become the ridge solution from
    the layer's inputs, as the layers before it make them now, to the dense layer's outputs; norms that lost channels
    get the weight and bias that fit best. Nothing is trained. In torch.distributed the ranks share the samples and end
    with the same weights, provided that every rank's loader yields the same batches.

    Args:
        pruned: the model to solve.
        dense: the model that it was; it is only read.
        loader: images as for :func:`~diffprune_fast.score`; noised at ``t = T * u^1.5``, u uniform.
        kept: ``(parameter, dim)`` to the ``(n,)`` indices of the dense parameter that the pruned model has, as
            ``Sliced.kept``; places that kept all may be missing.
        scheduler, loss_fn, autocast: as for :func:`~diffprune_fast.score`.
        mode: ``"full"`` solves for every weight; ``"channels"`` gives convolutions one mixing of the channels that are
            left for all places of the kernel, which is cheaper and leaves 1.5 to 2.4 times as much of the loss's
            excess; ``"auto"`` takes the first where it is estimated to end within ten minutes, or within twice the
            second's time.
        samples: inputs to solve from; if not given 128, or one for each rank where there are more.
        seed: the same one gives the same weights.
        ridge: what a change of the weights costs, as a share of the inputs' mean square.
        calibration: in place of a loader, forward calls of the model: tuples of positional arguments, dicts of named
            ones, or pairs of both; a third of their samples is held back for the losses.
        progress: shows a bar.

    Returns:
        The losses of the three models on samples that nothing was solved from, and what was done. Where the loss isn't
        lower the sliced weights stay. After an error or an interrupt they stay too, bit for bit.

    Raises:
        ValueError, TypeError: an argument, a loader or ``kept`` that doesn't fit.
        FloatingPointError: a loss that is NaN or infinite before anything was solved.

    Example:
        >>> import numpy as np, torch
        >>> dense = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
        >>> pruned = torch.nn.Sequential(torch.nn.Linear(8, 3), torch.nn.Linear(3, 2))
        >>> kept = {("0.weight", 0): np.arange(3), ("0.bias", 0): np.arange(3), ("1.weight", 1): np.arange(3)}
        >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> found = compensate(pruned, dense, kept=kept, calibration=[(x,)], progress=False)
        >>> found.layers, found.compensated < found.sliced
        (('1',), True)
    """
    begin = time.perf_counter()
    _check(loader, calibration, mode, samples, ridge, autocast)
    pruned, dense = unwrapped(pruned), unwrapped(dense)
    device = check_weights(pruned)
    if check_weights(dense) != device:
        raise ValueError("the dense and the pruned model are on different devices: move one to the other's")
    layers, alone = consumers(pruned, dense, kept)
    layers += norms(pruned, dense, kept, len(layers)) if layers else []
    with torch.inference_mode(False), torch.no_grad():
        cast = AUTOCAST[autocast]
        if calibration is not None:
            data = called(dense, calibration, seed=seed, autocast=cast, device=device)
        else:
            assert loader is not None
            data = drawn(
                dense,
                loader,
                scheduler=scheduler,
                loss_fn=loss_fn,
                samples=samples or max(SAMPLES, rank_and_count()[1]),
                held_back=HELD_BACK,
                seed=seed,
                autocast=cast,
                device=device,
            )
        found, weights = _compensated(pruned, dense, layers, data, mode, seed, ridge, progress)
        if found["helped"]:
            put(pruned, weights)
    return Compensation(
        **{**found, "alone": {**alone, **found["alone"]}},
        measure=data.measure,
        samples=data.samples,
        seconds=time.perf_counter() - begin,
    )


def _compensated(
    pruned: nn.Module,
    dense: nn.Module,
    layers: list[Consumer],
    data: Calibration,
    mode: CompensationMode,
    seed: int,
    ridge: float,
    progress: bool,
) -> tuple[dict[str, Any], dict[str, tuple[Tensor, Tensor | None]]]:
    """What is to be told, and the new weights of every layer; both models are as before."""
    with asleep(dense), asleep(pruned):
        works, forward, live = measured(dense, pruned, layers, data)
        device = next(pruned.parameters()).device
        plan: Estimate = decided(works, mode, *agreed(means_of(device), forward, device), live)
        before = {"dense": data.loss(dense), "sliced": data.loss(pruned)}
        for name, value in before.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"the {name} model's {data.measure} is {value}: look for NaN in its weights")
        seen = [layer for layer in layers if layer.name in plan.forms]
        mixed = frozenset(n for n, form in plan.forms.items() if form == "channels")
        targets = record(dense, seen, data, rows=plan.rows, of_inputs=mixed, seed=seed, half=plan.half)
        with bar(desc="compensating", show=progress, total=len(seen), unit="layer") as shown:
            solver = Solver(pruned, dense, targets, plan.forms, ridge, shown.update)
            solver.run(layers, data)
        after = data.loss(pruned) if solver.solved else before["sliced"]
    told = {
        **before,
        "compensated": after,
        "helped": bool(solver.solved) and after < before["sliced"],
        "layers": tuple(solver.solved),
        "alone": solver.alone,
        "mode": plan.mode,
        "why": plan.why,
        "bytes": plan.bytes,
    }
    return told, solver.solved


def put(model: nn.Module, weights: Mapping[str, tuple[Tensor, Tensor | None]]) -> None:
    """Copy new weights into the parameters of a model's layers: all of them or, after an error, none."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, (weight, bias) in weights.items():
        layer: Any = model.get_submodule(name)
        pairs += [(layer.weight, weight)] + ([] if bias is None else [(layer.bias, bias)])
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for there, new in pairs:
            before.append((there, there.detach().clone()))
            there.data.copy_(new)
    except BaseException:
        for there, old in before:
            there.data.copy_(old)
        raise


def _check(loader: Any, calibration: Any, mode: str, samples: int | None, ridge: float, autocast: Any) -> None:
    if (loader is None) == (calibration is None):
        raise ValueError("compensation needs inputs: give a loader or calibration=, one of the two")
    check_choice("mode", mode, CompensationMode)
    if samples is not None and samples < 1:
        raise ValueError(f"samples={samples}: at least one")
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge is a share of the inputs' mean square, 0 or more, not {ridge}")
    if autocast not in AUTOCAST:
        raise ValueError(f"autocast is None or 'bf16', not {autocast!r}")
