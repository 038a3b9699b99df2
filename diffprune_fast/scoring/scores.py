"""What scoring returns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..plan.blocks import Block
from ..plan.plan import Plan


@dataclass(frozen=True)
class LossCurve:
    """The model's loss over the timesteps, and which of them count.

    timesteps: ``(n,)`` int64, increasing. losses: ``(n,)`` float64, the mean loss at each. threshold: T; a timestep
    counts where ``L_t > T * L_max`` (Fang et al., 2023, eq. 7).
    """

    timesteps: np.ndarray
    losses: np.ndarray
    threshold: float

    @property
    def relative(self) -> np.ndarray:
        """``L_t / L_max``, ``(n,)``."""
        return self.losses / self.losses.max()

    @cached_property
    def kept_timesteps(self) -> np.ndarray:
        """Every timestep up to the curve's last that counts, by interpolation between the measured ones."""
        every = np.arange(int(self.timesteps[-1]) + 1)
        return every[np.interp(every, self.timesteps, self.relative) > self.threshold]

    @property
    def kept(self) -> tuple[int, int]:
        """The lowest and the highest timestep that count."""
        return int(self.kept_timesteps[0]), int(self.kept_timesteps[-1])


@dataclass(frozen=True)
class Sensitivities:
    """What the model's output loses when one cluster of groups alone is pruned and compensated.

    shares: ``(n_groups, n_points)`` float64, the shares of a group's units that went, rising; NaN where there are fewer
    points, or none for a group that stays whole. damage: ``(n_groups, n_points)`` float64, the mean squared change of
    the output. Groups that a constraint ties have the same. samples: inputs that layers were solved from. seconds:
    wall-clock time.
    """

    shares: np.ndarray
    damage: np.ndarray
    samples: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Scores:
    """One importance per unit; the lowest are the first to go.

    values: ``(plan.n_units,)`` float64 by plan-wide unit id. samples: sample passes, forward and backward, that they
    rest on. seconds: wall-clock time. agreement: Jaccard index of the keep-sets that two independent halves of the
    samples choose at ``agreement_ratio``: the trust in these scores, None where there are no two halves.
    curve: the loss over the timesteps, None where it wasn't needed.
    damage: ``(plan.n_units,)`` float64, the estimated mean squared change of the model's output when the unit's
    consumers lose it (Gauss-Newton), which compares between groups where ``values`` only order the units inside one;
    None without a loader, or where the model's output could not be seen. sensitivities: what clusters of groups cost
    when they are tried, see :func:`~diffprune_fast.sensitivity.measure_sensitivities`; None where they weren't.
    """

    values: np.ndarray
    estimator: str
    criterion: str
    seed: int
    samples: int = 0
    seconds: float = 0.0
    agreement: float | None = None
    agreement_ratio: float = 0.3
    curve: LossCurve | None = None
    variant: str | None = None
    damage: np.ndarray | None = None
    sensitivities: Sensitivities | None = None

    def of(self, plan: Plan, name: str) -> np.ndarray:
        """The scores of one group's units, ``(n_units,)``. Raises KeyError for a group that the plan doesn't have."""
        g = plan.position[name]
        return self.values[plan.offsets[g] : plan.offsets[g + 1]]

    def summary(self) -> dict[str, Any]:
        """Everything but the values, as plain JSON types."""
        found: dict[str, Any] = {
            "estimator": self.estimator,
            "criterion": self.criterion,
            "variant": self.variant,
            "seed": self.seed,
            "samples": self.samples,
            "seconds": round(self.seconds, 3),
            "agreement": self.agreement,
            "agreement_ratio": self.agreement_ratio,
        }
        if self.curve is not None:
            found["curve"] = {
                "timesteps": self.curve.timesteps.tolist(),
                "losses": self.curve.losses.tolist(),
                "threshold": self.curve.threshold,
            }
        return found


def rehearsed_scores(plan: Plan) -> Scores:
    """Scores that mean nothing but have everything, for trying out what would be done with real ones."""
    values = np.random.default_rng(0).random(plan.n_units)
    tried = Sensitivities(np.full((len(plan.groups), 1), 0.5), np.ones((len(plan.groups), 1)))
    return Scores(values, "none", "random", 0, damage=values, sensitivities=tried)


def keep_set_agreement(plan: Plan, a: np.ndarray, b: np.ndarray, ratio: float) -> float:
    """Jaccard index of the units that two score vectors keep when every group loses ``ratio`` of its units.

    1 is the same choice; at ratio 0.3 two random choices agree on 0.54. Constraints and rounding are left out: this
    measures the scores, not a selection.
    """
    both = either = 0
    for start, stop in zip(plan.offsets[:-1], plan.offsets[1:]):
        n = int(stop - start)
        going = int(ratio * n)
        left, right = (np.ones(n, bool) for _ in range(2))
        left[np.argsort(a[start:stop], kind="stable")[:going]] = False
        right[np.argsort(b[start:stop], kind="stable")[:going]] = False
        both += int((left & right).sum())
        either += int((left | right).sum())
    return both / either if either else 1.0


@dataclass(frozen=True)
class BlockScores:
    """What every residual block is worth to the loss.

    costs: ``(n_blocks,)`` float64, the estimated (``"first-order"``) or measured (``"loss"``) rise of the training loss
    when a block goes; first-order ones rank, their size is not that of the rise. agreement: rank correlation of the
    costs that odd and even micro-batches give, None for fewer than three blocks or two micro-batches.
    """

    blocks: tuple[Block, ...]
    costs: np.ndarray
    method: str
    samples: int
    seed: int
    seconds: float = 0.0
    agreement: float | None = None

    def cheapest(self, n: int) -> list[Block]:
        """The ``n`` blocks that cost least, none inside another. Raises ValueError where there aren't so many."""
        chosen: list[Block] = []
        for i in np.argsort(self.costs, kind="stable").tolist():
            block = self.blocks[i]
            if len(chosen) < n and not any(block.holds(b) or b.holds(block) for b in chosen):
                chosen.append(block)
        if n < 1 or len(chosen) < n:
            raise ValueError(f"{n} blocks can't be dropped: give a number from 1 to {len(chosen)}, or names")
        return [b for b in self.blocks if b in chosen]

    def __str__(self) -> str:
        width = max((len(b.name) for b in self.blocks), default=5)
        lines = [f"{'block':{width}}  {'cost':>10}  {'params':>8}  {'MACs':>9}  class"]
        for i in np.argsort(self.costs, kind="stable").tolist():
            b = self.blocks[i]
            params, macs = f"{b.params / 1e6:.2f}M", f"{b.macs / 1e6:.2f}M"
            lines.append(f"{b.name:{width}}  {self.costs[i]:10.3g}  {params:>8}  {macs:>9}  {b.kind}")
        trust = "" if self.agreement is None else f", rank correlation of the halves {self.agreement:.2f}"
        return "\n".join([*lines, f"{self.method}, {self.samples} samples{trust}"])
