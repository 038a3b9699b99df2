"""Which channels go together: one forward on ``meta`` with a label beside every activation."""

from __future__ import annotations

from torch import nn

from ..architectures.inputs import ExampleInputs, calls_of
from ..choices import Units, check_choice
from ..objective.shards import skeleton
from ..plan.plan import Plan
from .caches import collector_paused
from .channels import Channels, units_of_channels
from .graph import Graph
from .grouping import build_plan
from .heads import heads_to_take_whole, reach
from .interface import note_methods
from .kept_steps import keep_steps
from .probe import probe_plan
from .records import Calls
from .refusals import refuse_model, refuse_shared_memory
from .tracer import walk_forward
from .walk import Walk


def trace(model: nn.Module, example_inputs: ExampleInputs | None = None, *, units: Units = "auto") -> Plan:
    """Find which channels of a model must be removed together.

    The forward runs once on the meta device: no weight is read, no memory is taken for weights or activations, and
    the model is untouched when it ends.

    Args:
        model: any module, also one that FSDP2 has sharded; diffusers classes make their own ``example_inputs``.
        example_inputs: for other classes the forward's positional arguments as a tuple or its keyword arguments as a
            dict. Their shapes count, and their values where a forward asks for them; costs in the plan are those of
            one forward of them. Several calls, where other methods than the forward are used too: a list of
            ``(method, args, kwargs)``.
        units: what can be removed of an attention. ``"dims"``, single dims of all its heads, equally many of each;
            ``"heads"``, whole heads; ``"auto"``, dims, or heads where some dims have to stay (rotary embeddings, for
            one).

    Returns:
        The plan: groups of units, what constrains them, and what each costs. Printing it shows all three.

    Raises:
        TraceError: the forward failed or depends on the data; the message names the module.
        ValueError: nothing is known to call the model with, or ``units`` is something else.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> plan = trace(model, (torch.zeros(1, 4),))
        >>> print(plan.groups[0].name, plan.groups[0].n_units, [m.place for m in plan.groups[0].members])
        0 16 ['0.weight:0', '0.bias:0', '2.weight:1']
        >>> plan.params(), plan.params({"0": [0, 1, 2]})  # of the whole model, and with three units left
        (114, 23)
    """
    check_choice("units", units, Units)
    model = skeleton(model)
    refuse_model(model)
    calls = calls_of(model, example_inputs)
    plan, walk = _traced(model, calls, units)
    keep_steps(plan, model, calls, walk.steps)
    return plan


@collector_paused()
def _traced(model: nn.Module, calls: Calls, units: Units) -> tuple[Plan, Walk]:
    """The plan, and the walk that it was made of."""
    channels = Channels.of(model)
    walk = walk_forward(model, channels, Graph(channels.total), calls)
    note_methods(model, walk, calls)
    plan = build_plan(model, walk)
    refuse_shared_memory(model, plan)
    if units != "heads":  # what the probe leaves whole may go by the head as well
        plan = probe_plan(model, walk, plan, calls)
    heads = heads_to_take_whole(walk.attended, units_of_channels(plan, channels), units)
    if heads is None:
        return (plan if units != "heads" else probe_plan(model, walk, plan, calls)), walk
    again = walk_forward(model, channels, Graph(channels.total, heads=heads), calls)
    note_methods(model, again, calls)
    by_heads = probe_plan(model, again, build_plan(model, again), calls)
    return (by_heads, again) if units == "heads" or reach(by_heads) >= reach(plan) else (plan, walk)
