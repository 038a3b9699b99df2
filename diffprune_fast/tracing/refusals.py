"""Models that can't be followed or sliced, whatever their forward does: refused by name before anything else."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..module_tree import buffers_of, modules_of, parameters_of
from ..plan.plan import Plan
from .channels import Channels
from .errors import TraceError
from .graph import Graph

_FLAT = "lies with others in one piece of memory, for cuDNN: trace the model before it is moved to the GPU"


def refuse_model(model: nn.Module) -> None:
    """Raises TraceError for scripted modules and for parameters made of other tensors (a DTensor, quantised)."""
    for name, module in modules_of(model).items():
        if isinstance(module, torch.jit.ScriptModule):
            raise TraceError(
                f"{name or 'the model'} is compiled by torch.jit.script or .trace, whose code can't be followed: give "
                "the module that it was made from"
            )
    for name, t in (*parameters_of(model).items(), *buffers_of(model).items()):
        if is_traceable_wrapper_subclass(t):
            raise TraceError(
                f"{name} is a {type(t.data).__name__}, a tensor made of others (spread by tensor parallelism, or "
                "quantised), which can't be sliced: prune the model first and spread or quantise the smaller one"
            )


def refuse_shared_memory(model: nn.Module, plan: Plan) -> None:
    """Raises TraceError where a tensor that would be sliced shares its memory with another one."""
    sliced = {m.parameter for g in plan.groups for m in g.members}
    names: dict[int, str] = {}
    for name, t in (*parameters_of(model).items(), *buffers_of(model).items()):
        at = _memory(t)
        if at is None:
            continue
        other = names.setdefault(at, name)
        if other != name and sliced & {name, other}:
            raise TraceError(
                f"{other} and {name} are two tensors in the same memory (tied through .data, or windows of one flat "
                "tensor): slicing one would destroy the other. Tie them by assigning the parameter itself, or give "
                "each memory of its own: p.data = p.data.clone()"
            )


def freeze_flat_weights(model: nn.Module, channels: Channels, graph: Graph) -> None:
    """The weights that an RNN keeps as windows of one tensor, for cuDNN, stay as they are."""
    for module in modules_of(model).values():
        if isinstance(module, nn.RNNBase):
            memory = [_memory(p) for p in module.parameters()]
            if len(set(memory)) < len(memory) and None not in memory:
                for p in module.parameters():
                    for label_map in channels.maps(channels.names[id(p)]):
                        graph.freeze(label_map, _FLAT)


def _memory(t: Tensor) -> int | None:
    return None if t.is_meta or not t.numel() else t.untyped_storage().data_ptr() or None
