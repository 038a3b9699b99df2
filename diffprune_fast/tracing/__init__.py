"""Which channels go together: one forward on ``meta`` with a label beside every activation."""

from __future__ import annotations

from typing import Any

from torch import nn

from .errors import TraceError
from .gate import GateError, Sliced, pass_gate, sliced_shapes, units_of_nodes
from .grouping import build_plan, unreached
from .heads import UNITS, Heads, heads_to_take_whole, reach
from .inputs import calls_of
from .labels import Graph
from .nodes import Nodes
from .plan import Attribute, Constraint, Cost, Extents, Group, Member, Plan, ScaleFix
from .probe import probed
from .walk import Calls, Walk

__all__ = [
    "Attribute",
    "Constraint",
    "Cost",
    "Extents",
    "GateError",
    "Group",
    "Member",
    "Plan",
    "ScaleFix",
    "Sliced",
    "TraceError",
    "pass_gate",
    "sliced_shapes",
    "trace",
    "unreached",
]


def trace(
    model: nn.Module, example_inputs: tuple[Any, ...] | dict[str, Any] | None = None, *, units: str = "auto"
) -> Plan:
    """Find which channels of a model must be removed together.

    The forward runs once on the meta device: no weight is read, no memory is taken for weights or activations, and
    the model is untouched when it ends. diffusers classes make their own ``example_inputs``; for others, give the
    forward's positional arguments as a tuple or its keyword arguments as a dict (their shapes count, not their
    values). Costs in the plan are those of one forward of these inputs.

    units: what can be removed of an attention. ``"dims"``, single dims of all its heads, equally many of each;
    ``"heads"``, whole heads; ``"auto"``, dims, or heads where some dims have to stay (rotary embeddings, for one).

    Raises:
        TraceError: the forward failed or depends on the data; the message names the module.
        ValueError: nothing is known to call the model with, or ``units`` is something else.
    """
    if units not in UNITS:
        raise ValueError(f"units={units!r}: choose one of {', '.join(map(repr, UNITS))}")
    calls = calls_of(model, example_inputs)
    nodes = Nodes.of(model)
    walk = _walked(model, nodes, calls)
    plan = build_plan(model, walk)
    heads = heads_to_take_whole(walk.attended, units_of_nodes(plan, nodes), units)
    if heads is None:
        return probed(model, walk, plan, calls)
    again = _walked(model, nodes, calls, heads)
    by_heads = probed(model, again, build_plan(model, again), calls)
    if units == "heads" or reach(by_heads) >= reach(plan):
        return by_heads
    return max(by_heads, probed(model, walk, plan, calls), key=reach)


def _walked(model: nn.Module, nodes: Nodes, calls: Calls, heads: Heads | None = None) -> Walk:
    walk = Walk(model, nodes, Graph(nodes.total, heads=heads))
    walk.follow(model, calls)
    return walk
