"""What pruning returns: the smaller model with everything that says how it came to be."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from .tracing import Plan, unreached

if TYPE_CHECKING:
    from .depth import BlockScores
    from .scoring import Scores
    from .selection import Selection


@dataclass(frozen=True)
class Complexity:
    """params: number of parameters. macs: multiply-accumulates of one forward of one sample."""

    params: int
    macs: int

    def __str__(self) -> str:
        return f"{self.params / 1e6:.2f}M parameters, {self.macs / 1e9:.4g} GMACs"


@dataclass
class PruneResult:
    """A pruned model and its proof.

    model: the pruned model. plan: the plan of the model as it was. keep: group name to the sorted unit indices that
    stay. before, after: what it cost and what it costs. shapes: every parameter and floating-point buffer after
    slicing. attributes: the module attributes that slicing changed (``"conv_in.out_channels"`` to the new value).
    seconds: wall-clock time per stage. dropped: the residual blocks that were taken out first, blocks: what each would
    have cost; then ``plan`` is that of the model without them and ``before`` what it cost with them. pipeline,
    component: the diffusers pipeline that the model is part of, and the model's name there; None for a model alone.
    """

    model: nn.Module
    plan: Plan
    keep: Mapping[str, np.ndarray]
    before: Complexity
    after: Complexity
    norm_groups: str = "count"
    scores: Scores | None = None
    selection: Selection | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    seed: int | None = None
    dropped: tuple[str, ...] = ()
    blocks: BlockScores | None = None
    pipeline: Any = None
    component: str | None = None

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write safetensors, ``config.json`` and ``diffprune.json`` into ``directory``; the whole pipeline, if one was
        given."""
        if self.pipeline is not None:
            from .pipelines.saving import save_pipeline

            return save_pipeline(self, directory)
        from .checkpoint import save

        save(self, directory)

    def __str__(self) -> str:
        lines = [f"before: {self.before}", f"after:  {self.after}"]
        if self.selection is not None:
            lines += [f"asked:  {self.selection.asked}", f"met:    {self.selection.met}"]
            lines += [f"note:   {note}" for note in self.selection.notes]
        if self.dropped:
            lines.append(f"blocks dropped: {', '.join(self.dropped)}")
        lines.append(f"norm groups: {self.norm_groups}")
        if self.scores is not None and self.scores.agreement is not None:
            lines.append(f"split-half agreement: {self.scores.agreement:.3f} after {self.scores.samples} samples")
        if aside := unreached(self.plan):
            first = ", ".join(aside[:3]) + (", …" if len(aside) > 3 else "")
            lines.append(
                f"note:   {len(aside)} parameters were not reached by the example call ({first}): calls that use them "
                "won't fit"
            )
        return "\n".join(lines)
