"""One rule per aten op: what the op does to the labels of its operands."""

from __future__ import annotations

from . import attention, contractions, convolution, elementwise, movement, norms, routing  # noqa: F401  (they register)
from .registry import Operation, apply_rule, has_rule

__all__ = ["Operation", "apply_rule", "has_rule"]
