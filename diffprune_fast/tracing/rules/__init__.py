"""One rule per aten op: what the op does to the labels of its operands."""

from __future__ import annotations

from . import attention, contractions, convolution, elementwise, movement, norms  # noqa: F401  (they register their rules)
from .registry import RULES, unknown

__all__ = ["RULES", "unknown"]
