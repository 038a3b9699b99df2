"""Turn each attention head's basis so that the directions it needs least are single dims, before anything is scored."""

from __future__ import annotations

from .heads import HeadPair, Place, find_heads
from .rotate import Rotation, rotate_heads

__all__ = ["HeadPair", "Place", "Rotation", "find_heads", "rotate_heads"]
