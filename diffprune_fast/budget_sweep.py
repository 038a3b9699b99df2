"""What other budgets would cost: many of them out of one scoring run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .choices import CompensationMode, Units
from .footprint.promise import Promise
from .plan.plan import Complexity
from .scoring.scores import Scores, rehearsed_scores
from .selection.budgets import BudgetError
from .stages import Stages, by_function, keywords

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
    if not budgets:
        raise BudgetError("budgets is empty: give some shares")
    scoring, selecting = by_function(options, also=keywords(sweep))
    run = Stages(
        model,
        loader,
        component=component,
        budget={kind: budgets[0]},
        norm_groups=selecting.pop("norm_groups", "count"),
        inplace=False,
        optimizer=None,
        example_inputs=example_inputs,
        compensate=compensate,
        proof=False,
        seed=seed,
        scoring=scoring,
        selecting=selecting,
    )
    if run.loader is None:
        raise ValueError("a sweep compares losses: give a loader, or None with a criterion that needs data")
    points: list[Point] = []
    missing: dict[float, str] = {}
    loss = float("nan")
    try:
        run.trace(None, units=units)
        for asked in budgets:
            run.ask({kind: asked})
            try:
                run.wish.select(run.plan, rehearsed_scores(run.plan))
            except BudgetError as e:
                missing[asked] = str(e)
        met = [asked for asked in budgets if asked not in missing]
        if not met:
            raise BudgetError(next(iter(missing.values())))
        run.ask({kind: met[0]})
        run.rehearse()
        if rotate:
            run.rotate_heads()
        run.score()
        for asked in met:
            run.ask({kind: asked})
            try:
                run.select()
            except BudgetError as e:
                missing[asked] = str(e)
                continue
            run.slice_and_compensate()
            result = run.change.result
            found: Any = result.compensation
            loss, best = found.dense, found.compensated if found.helped else found.sliced
            promise = run.promises[0] if run.promises else None
            points.append(Point(asked, result.after, found.sliced, best, promise))
    finally:
        run.undo()
    return Sweep(kind, run.plan.complexity(), loss, tuple(points), missing, run.scores)
