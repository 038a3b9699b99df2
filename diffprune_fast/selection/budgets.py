"""What the pruned model must meet, and the error for what cannot be met."""

from __future__ import annotations

import difflib
import math
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate

import numpy as np

from ..plan.plan import Plan

BUDGETS = ("ratio", "params", "macs", "latency", "memory")


DEFAULT_RATIO = 0.3


UNITS = {"params": "parameters", "macs": "MACs", "memory": "bytes"}


class BudgetError(ValueError):
    """A budget that this model can't meet; the message says how far one can get."""


@dataclass(frozen=True)
class Budget:
    """kind: ``"ratio"`` (share of units that goes), ``"params"``, ``"macs"``, ``"latency"``, ``"memory"`` or another
    name (what stays).

    value: a share in (0, 1), or, but for ratio and latency, a number of parameters, MACs, bytes, … from 1 upwards.
    """

    kind: str
    value: float

    def __str__(self) -> str:
        if self.value < 100:  # from 1 upwards most likely meant as a share or a percentage
            note = "" if self.value < 1 else f" (a number of {UNITS.get(self.kind, self.kind)}, as it is above 1)"
            return f"{self.kind}={self.value:g}{note}"
        return f"{self.kind}={int(self.value):,}"

    def limit(self, whole: float) -> float:
        """The most that may stay of ``whole``."""
        return self.value * whole if self.value < 1 else self.value


def parse_budget(asked: Mapping[str, float | None]) -> Budget:
    """:func:`parse_budgets` where there may be only one of them."""
    found = parse_budgets(asked)
    if len(found) > 1:
        raise ValueError(f"{' and '.join(map(str, found))}: give one budget, not {len(found)}")
    return found[0]


def parse_budgets(asked: Mapping[str, float | None], others: Iterable[str] = ()) -> tuple[Budget, ...]:
    """Read budgets from ``{"ratio": ..., "params": ..., "macs": ...}``; None is not asked, nothing is ratio 0.3.

    others: names that are budgets as well.

    Raises TypeError for a name that isn't a budget or a value that isn't a number; ValueError for a ratio beside
    another budget or a value out of range.
    """
    for name in asked:
        if name not in (known := (*BUDGETS, *others)):
            near = difflib.get_close_matches(name, known, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise TypeError(f"{name!r} is not a budget{hint}: give one of {', '.join(known)}")
    given = {name: value for name, value in asked.items() if value is not None}
    if len(given) > 1 and "ratio" in given:
        both = " and ".join(f"{name}={value}" for name, value in given.items())
        raise ValueError(f"{both}: give one budget, not {len(given)} (all others can be combined)")
    return tuple(_parsed(name, value) for name, value in given.items()) or (Budget("ratio", DEFAULT_RATIO),)


def _parsed(name: str, value: float) -> Budget:
    check_number(name, value)
    if name == "ratio":
        check_ratio("ratio", value)
    elif name == "latency" and not 0 < value < 1:
        raise ValueError(f"latency={value}: give the share of the dense model's time that stays, between 0 and 1")
    elif value <= 0 or value == 1 or math.isnan(value) or math.isinf(value):
        raise ValueError(
            f"{name}={value}: give the share that stays, between 0 and 1 (0.5 keeps half), or a number of "
            f"{UNITS.get(name, name)} above 1"
        )
    return Budget(name, float(value))


def check_number(name: str, value: object) -> None:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (numbers.Real, np.number)):
        raise TypeError(f"{name} must be a number, not {value!r}")


def check_ratio(name: str, value: float, *, none_allowed: bool = False) -> None:
    """Raise ValueError unless ``value`` is a share of units that may go."""
    if not (0 < value < 1 or (none_allowed and value == 0)):
        lowest = "0 <=" if none_allowed else "0 <"
        raise ValueError(f"{name}={value}: the share of units to remove must be {lowest} {name} < 1 (0.3 removes 30 %)")


def match_groups(plan: Plan, patterns: Sequence[str], what: str) -> list[np.ndarray]:
    """Per pattern, which groups it names: ``(n_groups,)`` bool.

    A pattern (``fnmatch``: ``*``, ``?``, ``[...]``) names a group by its name or by any parameter in it.

    Raises ValueError for a pattern that names nothing, which is a typing mistake more often than not.
    """
    masks = []
    for pattern in patterns:
        matches = re.compile(translate(pattern)).match
        mask = np.array(
            [bool(matches(g.name)) or any(matches(m.parameter) for m in g.members) for g in plan.groups], bool
        )
        if not mask.any():
            near = difflib.get_close_matches(pattern, [m.parameter for g in plan.groups for m in g.members], 1, 0.5)
            hint = f" (is it {near[0]!r}?)" if near else ""
            raise ValueError(f"{what}: {pattern!r} matches no group and no prunable parameter{hint}")
        masks.append(mask)
    return masks
