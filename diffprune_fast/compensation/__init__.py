"""Making up for channels that are gone, without training: the layers that read them are solved anew."""

from __future__ import annotations

from .compensate import Compensation, compensate
from .estimates import CompensationMode, Estimate, estimate

__all__ = ["Compensation", "CompensationMode", "Estimate", "compensate", "estimate"]
