"""How many units stay, and which."""

from __future__ import annotations

from .budgets import Budget, BudgetError, parse_budget
from .select import Selection, select

__all__ = ["Budget", "BudgetError", "Selection", "parse_budget", "select"]
