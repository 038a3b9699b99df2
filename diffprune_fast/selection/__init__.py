"""How many units stay and which: budgets, constraints, rounding, ranking."""

from .constraints import violations

__all__ = ["violations"]
