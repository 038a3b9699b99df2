"""Both operations on the CPU, by the C++ extension ``diffprune_fast._cpu``."""

from __future__ import annotations


def availability() -> str:
    """``"ok"``, or why the extension can't serve."""
    return "not built yet"
