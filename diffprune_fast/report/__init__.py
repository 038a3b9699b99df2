"""The page and the pictures a person looks at."""

from __future__ import annotations

from .card import write_card
from .curves import timestep_curves, training_curve
from .figures import kept_channels, loss_curve, sample_grids
from .page import write_report
from .table import Measured, print_table
from .whole import kept_whole

__all__ = [
    "Measured",
    "kept_channels",
    "kept_whole",
    "loss_curve",
    "print_table",
    "sample_grids",
    "timestep_curves",
    "training_curve",
    "write_card",
    "write_report",
]
