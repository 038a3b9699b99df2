"""Which channels go together: one forward on ``meta`` with a label beside every activation."""

from __future__ import annotations

from .errors import TraceError
from .trace import trace
from .verification import VerificationError, verify_sliced

__all__ = ["TraceError", "VerificationError", "trace", "verify_sliced"]
