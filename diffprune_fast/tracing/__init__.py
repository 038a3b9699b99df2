"""Which channels go together: one forward on ``meta`` with a label beside every activation."""

from .plan import Attribute, Constraint, Cost, Extents, Group, Member, Plan, ScaleFix

__all__ = ["Attribute", "Constraint", "Cost", "Extents", "Group", "Member", "Plan", "ScaleFix"]
