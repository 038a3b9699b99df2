"""What goes together in a model, as data."""

from __future__ import annotations

from .blocks import Block
from .constraints import violations
from .fixes import NormFix, ScaleFix
from .keep_sets import Sliced, sliced_shapes
from .lattice import Lattice, lattice
from .masks import keep_from_masks
from .plan import Attribute, Complexity, Constraint, Cost, Extents, Group, Member, Plan, unreached

__all__ = [
    "Attribute",
    "Block",
    "Complexity",
    "Constraint",
    "Cost",
    "Extents",
    "Group",
    "Lattice",
    "Member",
    "NormFix",
    "Plan",
    "ScaleFix",
    "Sliced",
    "keep_from_masks",
    "lattice",
    "sliced_shapes",
    "unreached",
    "violations",
]
