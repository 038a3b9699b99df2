"""Which channels go together: one forward on ``meta`` with a label beside every activation."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..architectures.inputs import calls_of
from ..choices import Units, check_choice
from ..plan.plan import Plan
from .channels import Nodes, units_of_nodes
from .graph import Graph
from .grouping import build_plan
from .heads import heads_to_take_whole, reach
from .probe import probed
from .tracer import follow


def trace(
    model: nn.Module, example_inputs: tuple[Any, ...] | dict[str, Any] | None = None, *, units: Units = "auto"
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
    check_choice("units", units, Units)
    calls = calls_of(model, example_inputs)
    nodes = Nodes.of(model)
    walk = follow(model, nodes, Graph(nodes.total), calls)
    plan = build_plan(model, walk)
    heads = heads_to_take_whole(walk.attended, units_of_nodes(plan, nodes), units)
    if heads is None:
        return probed(model, walk, plan, calls)
    again = follow(model, nodes, Graph(nodes.total, heads=heads), calls)
    by_heads = probed(model, again, build_plan(model, again), calls)
    if units == "heads" or reach(by_heads) >= reach(plan):
        return by_heads
    return max(by_heads, probed(model, walk, plan, calls), key=reach)
