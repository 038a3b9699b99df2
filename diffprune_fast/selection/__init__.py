"""How many units stay and which: budgets, constraints, rounding, ranking."""

from .budgets import Budget, BudgetError, parse_budget
from .choosing import Selection, select
from .constraints import violations

__all__ = ["Budget", "BudgetError", "Selection", "parse_budget", "select", "violations"]
