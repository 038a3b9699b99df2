"""Which channels go together: one forward on ``meta`` with a label beside every activation."""

from __future__ import annotations

from .errors import TraceError
from .trace import trace
from .verification import GateError, pass_gate

__all__ = ["GateError", "TraceError", "pass_gate", "trace"]
