"""Making up for channels that are gone, without training: the layers that read them are solved anew."""

from __future__ import annotations

from ..choices import CompensationMode
from .compensate import Compensation, compensate
from .estimates import Estimate, estimate

__all__ = ["Compensation", "CompensationMode", "Estimate", "compensate", "estimate"]
