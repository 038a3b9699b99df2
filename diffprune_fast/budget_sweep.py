"""What other budgets would cost: many of them out of one scoring run."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from . import compensation
from .architectures.inputs import knows_inputs
from .choices import CompensationMode, Units
from .footprint.promise import Promise
from .objective.batches import replayed
from .objective.calls import first_call
from .pipelines.target import find_target
from .plan.keep_sets import sliced_shapes
from .plan.plan import Complexity, Keep, Plan
from .promises import costs_of, keep_promises, measurable
from .rotation.rotate import rotate_heads
from .scoring.score import score
from .scoring.scores import Scores, rehearsed_scores
from .selection.budgets import Budget, BudgetError
from .selection.costs import Cost
from .selection.select import Selection, select
from .slicing.commit import undo
from .slicing.prune import prune
from .tracing.trace import trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3)


@dataclass(frozen=True)
class Point:
    """One budget: what was asked, what the model then costs, its loss as sliced and as compensated.

    promise: of time or memory, as asked, predicted and measured.
    """

    asked: float
    after: Complexity
    sliced: float
    compensated: float
    promise: Promise | None = None

    @property
    def share(self) -> float:
        """What is left of time or memory, as measured; NaN for other budgets."""
        if self.promise is None:
            return float("nan")
        return self.promise.predicted if self.promise.measured is None else self.promise.measured


@dataclass(frozen=True)
class Sweep:
    """Loss against cost.

    kind: ``"macs"``, ``"params"``, ``"latency"`` or ``"memory"``. before: what the dense model costs. dense: its
    loss, on the samples that the points' losses are of. points: in the order in which they were asked. missing: budgets
    that can't be met, with the reason. scores: with them :func:`select` gives the keep-sets of any further budget.
    """

    kind: str
    before: Complexity
    dense: float
    points: tuple[Point, ...]
    missing: dict[float, str]
    scores: Scores

    def figure(self) -> Figure:
        """The losses against the share that stays, as a matplotlib figure."""
        from .report.figures import tradeoff

        if self.kind in ("latency", "memory"):
            costs = [point.share for point in self.points]
        else:
            costs = [getattr(p.after, self.kind) / getattr(self.before, self.kind) for p in self.points]
        losses = {"sliced": [p.sliced for p in self.points], "compensated": [p.compensated for p in self.points]}
        named = {"macs": "MACs", "params": "parameters", "latency": "time"}
        return tradeoff(costs, losses, self.dense, cost=named.get(self.kind, self.kind))

    def __str__(self) -> str:
        head = f"{self.kind:>7}  parameters   GMACs   sliced  compensated"
        measured = any(p.promise is not None for p in self.points)
        lines = [f"{self.before}, loss {self.dense:.4g}", head + ("  measured" if measured else "")]
        for p in self.points:
            lines.append(
                f"{p.asked:>7.6g}  {p.after.params / 1e6:>9.2f}M  {p.after.macs / 1e9:>6.4g}  {p.sliced:>7.4g}  "
                f"{p.compensated:>11.4g}" + (f"  {p.share:>8.3f}" if measured else "")
            )
        return "\n".join([*lines, *(f"{asked:>7.6g}  {why}" for asked, why in self.missing.items())])


def sweep(
    model: Any,
    loader: Iterable[Any],
    *,
    budgets: Sequence[float] = SHARES,
    kind: Literal["macs", "params", "latency", "memory"] = "macs",
    component: str | None = None,
    units: Units = "auto",
    rotate: bool = True,
    compensate: CompensationMode = "auto",
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
    seed: int = 0,
    **options: Any,
) -> Sweep:
    """Loss, sliced and compensated, against cost: a dozen budgets out of one scoring run.

    The model is left as it was; of the pruned ones only the figures are kept. Each is what :func:`score_and_prune` with
    the same seed and options gives for that budget.

    Args:
        model, loader, component, units, rotate, compensate, example_inputs, seed: as for :func:`score_and_prune`.
        budgets: shares that stay, or numbers.
        kind: of what. Time and memory are measured on every sliced copy, as :func:`score_and_prune` does.
        options: of :func:`score` and :func:`select`.

    Returns:
        A point per budget; printing it shows a table, ``figure()`` draws it.

    Raises:
        BudgetError: none of the budgets can be met.
        ValueError, TypeError: as :func:`score_and_prune`.

    Example:
        >>> import torch
        >>> from diffusers import UNet2DModel
        >>> unet = UNet2DModel(8, block_out_channels=(8, 16), down_block_types=("DownBlock2D",) * 2,
        ...                    up_block_types=("UpBlock2D",) * 2, norm_num_groups=4)
        >>> images = [torch.rand(16, 3, 8, 8) * 2 - 1]
        >>> found = sweep(unet, images, budgets=(0.8, 0.6), round_to=4, max_samples=32, progress=False)
        >>> [point.after.macs <= point.asked * found.before.macs for point in found.points]
        [True, True]
    """
    of_select = {name: options.pop(name) for name in [*options] if name in inspect.signature(select).parameters}
    asking: Any = lambda share, **more: {kind: share, **of_select, **more}  # noqa: E731
    target = find_target(model, component, loader, options)
    dense: Any = target.model
    seen: Any = replayed(target.loader or loader)
    training: dict[str, Any] = {"seed": seed, "scheduler": target.scheduler, "loss_fn": options.get("loss_fn")}
    if example_inputs is None and not knows_inputs(dense):
        example_inputs, seen = first_call(dense, seen, **training)
    plan = trace(dense, example_inputs, units=units)
    promised = {asked: measurable({kind: asked}) for asked in budgets}
    costs = dict(of_select.pop("costs", {}))
    slicing = {"example_inputs": example_inputs, "norm_groups": of_select.get("norm_groups", "count")}
    if any(promised.values()):
        costs = costs_of(dense, plan, promised[budgets[0]], costs, of_select.get("round_to", 8), **slicing)
    missing: dict[float, str] = {}
    for asked in budgets:
        try:
            select(plan, rehearsed_scores(plan), **asking(asked, costs=costs))
        except BudgetError as e:
            missing[asked] = str(e)
    if len(missing) == len(budgets):
        raise BudgetError(next(iter(missing.values()), "budgets is empty: give some shares"))
    points, loss = [], float("nan")
    turned = [rotate_heads(dense, plan, seen, **training).undo] if rotate else []
    try:
        scores = score(dense, seen, plan, **{**options, "seed": seed, "scheduler": target.scheduler})
        for asked in budgets:
            if asked in missing:
                continue
            try:
                keep, promise = _chosen(dense, plan, scores, promised[asked], costs, asking, asked, example_inputs)
            except BudgetError as e:
                missing[asked] = str(e)
                continue
            result = prune(dense, plan, keep, inplace=False, example_inputs=example_inputs)
            found = compensation.compensate(
                result.model,
                dense,
                seen,
                kept=sliced_shapes(dense, plan, keep).kept,
                mode=compensate,
                autocast=options.get("autocast"),
                progress=options.get("progress", True),
                **training,
            )
            best, loss = found.compensated if found.helped else found.sliced, found.dense
            points.append(Point(asked, result.after, found.sliced, best, promise))
    finally:
        undo(turned)
    return Sweep(kind, plan.complexity(), loss, tuple(points), missing, scores)


def _chosen(
    dense: Any,
    plan: Plan,
    scores: Scores,
    promised: Sequence[Budget],
    costs: Mapping[str, Cost],
    asking: Any,
    asked: float,
    example_inputs: Any,
) -> tuple[Keep, Promise | None]:
    """The keep-set of a budget, with what was measured of it."""
    if not promised:
        return select(plan, scores, **asking(asked, costs=costs)).keep, None

    def choose(now: Mapping[str, Cost]) -> Selection:
        return select(plan, scores, **asking(asked, costs=now))

    selection, promises = keep_promises(dense, plan, promised, costs, choose, example_inputs=example_inputs)
    return selection.keep, promises[0]
