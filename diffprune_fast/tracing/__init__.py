"""Which channels go together: one forward on ``meta`` with a label beside every activation."""

from __future__ import annotations

from typing import Any

from torch import nn

from .gate import GateError, Sliced, pass_gate, sliced_shapes
from .grouping import build_plan
from .inputs import calls_of
from .labels import Graph
from .plan import Attribute, Constraint, Cost, Extents, Group, Member, Plan, ScaleFix
from .probe import probed
from .walk import Nodes, TraceError, Walk, explained

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
]


def trace(model: nn.Module, example_inputs: tuple[Any, ...] | dict[str, Any] | None = None) -> Plan:
    """Find which channels of a model must be removed together.

    The forward runs once on the meta device: no weight is read, no memory is taken for weights or activations, and
    the model is untouched when it ends. diffusers classes make their own ``example_inputs``; for others, give the
    forward's positional arguments as a tuple or its keyword arguments as a dict (their shapes count, not their
    values). Costs in the plan are those of one forward of these inputs.

    Raises:
        TraceError: the forward failed or depends on the data; the message names the module.
    """
    calls = calls_of(model, example_inputs)
    nodes = Nodes.of(model)
    walk = Walk(model, nodes, Graph(nodes.total))
    try:
        walk.go(model, calls)
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(explained(model, walk, error)) from error
    return probed(model, walk, build_plan(model, walk), calls)
