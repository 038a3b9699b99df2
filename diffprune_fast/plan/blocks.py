"""Residual blocks as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Block:
    """A module that returns its input with something added to it.

    kind: its class. params: parameters that nothing else has. macs: multiply-accumulates of one forward of the example
    inputs. returns: which of its arguments are left where it is dropped.
    """

    name: str
    kind: str
    params: int
    macs: int
    returns: Returns = field(repr=False)

    def holds(self, other: Block) -> bool:
        """Whether ``other`` lies inside this block."""
        return other.name.startswith(self.name + ".")


# Which inputs a block hands on: the name of one argument, None, or a list of these for a block that returns a tuple.
Returns = str | list[Any] | None
