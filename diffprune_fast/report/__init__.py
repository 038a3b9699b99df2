"""The page and the pictures a person looks at."""

from __future__ import annotations

from .figures import kept_channels, loss_curve, sample_grids
from .page import write_report
from .table import Measured, print_table

__all__ = ["Measured", "kept_channels", "loss_curve", "print_table", "sample_grids", "write_report"]
