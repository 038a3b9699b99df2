"""What was asked of a model's time or memory, what was expected, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Promise:
    """A budget that can be measured.

    kind: ``"latency"``, ``"memory"`` or another cost's name. asked, predicted, measured: shares of the dense model;
    measured is None for a cost that nobody can measure. dense: what the dense model takes, in words.
    """

    kind: str
    asked: float
    predicted: float
    measured: float | None
    dense: str

    def __str__(self) -> str:
        found = "not measured" if self.measured is None else f"measured {self.measured:.3f}"
        return f"{self.kind}: asked {self.asked:.3g}, predicted {self.predicted:.3f}, {found} of {self.dense}"
