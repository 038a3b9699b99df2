"""Torch-Pruning with this package's kernels and plans: its importances in one pass, its slicing, its gaps."""

from __future__ import annotations

from .acceleration import Acceleration, accelerate
from .history import kept_from_history
from .importance import FusedImportance
from .plan_pruner import PlanGroup, PlanPruner, plan_to_groups
from .plans import plan_from_dependency_graph

__all__ = [
    "Acceleration",
    "FusedImportance",
    "PlanGroup",
    "PlanPruner",
    "accelerate",
    "kept_from_history",
    "plan_from_dependency_graph",
    "plan_to_groups",
]
