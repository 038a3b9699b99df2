"""What each cluster of channels costs, by trying it."""

from __future__ import annotations

from .measure import measure_sensitivities

__all__ = ["measure_sensitivities"]
