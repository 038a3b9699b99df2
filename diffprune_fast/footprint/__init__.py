"""What a forward takes on a device: seconds and bytes, as functions of how many units every group keeps."""

from __future__ import annotations

from .memory import Memory, count_memory
from .times import Times, measure_times

__all__ = ["Memory", "Times", "count_memory", "measure_times"]
