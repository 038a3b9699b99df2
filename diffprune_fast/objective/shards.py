"""Models that FSDP2 (``fully_shard``) has spread over ranks: what a rank holds as plain tensors, and the whole.

Tensor parallelism is another way to spread a model, which :func:`shards_of` and ``check_whole`` refuse.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .ranks import rank_and_count

_FSDP = "torch.distributed.fsdp"
# How the names begin of what fully_shard leaves in a module's attributes.
_LEFT = ("__composable_api_state_key", "_is_fsdp_managed_module", "_fsdp_use_orig_params")


@dataclass(frozen=True)
class Shard:
    """A rank's part of a parameter: ``length`` indices of ``dim`` from ``start``; no length where others count it."""

    dim: int
    start: int
    length: int


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules of ``model`` that ``fully_shard`` was called with, the outermost first."""
    library = sys.modules.get(_FSDP)  # who hasn't imported it has sharded nothing
    kind = getattr(library, "FSDPModule", None)
    return [] if kind is None else [m for m in model.modules() if isinstance(m, kind)]


def is_spread(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, whose elements are spread over ranks."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def local(tensor: Any) -> Any:
    """What this rank holds of a tensor, in the same memory; plain tensors as they are."""
    return tensor.to_local() if is_spread(tensor) else tensor


def whole(tensor: Any) -> Any:
    """All of a tensor, on every rank: all of them have to ask. Plain tensors as they are."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def spread_like(value: Tensor, other: Any) -> Tensor:
    """A whole tensor, the same on all ranks, spread as ``other`` is; nothing is sent."""
    if not is_spread(other):
        return value
    part, found = _held_of(other), torch.empty_like(other.detach(), dtype=value.dtype)
    local(found).copy_(value.narrow(part.dim, part.start, part.length))
    return found


def reshard(model: nn.Module) -> None:
    """Put the shards back where a forward without backward has left whole parameters."""
    for module in fsdp_modules(model):
        module.reshard()


def shards_of(model: nn.Module) -> dict[str, Shard] | None:
    """Which part of every parameter this rank counts; None for a model that isn't sharded.

    What several ranks hold, whole parameters or copies of a shard, the first of them counts. Raises ValueError for
    parameters that were spread in another way than by ``fully_shard``, or whose shards lie on another device than they
    are used on.
    """
    if not fsdp_modules(model):
        return None
    reshard(model)
    return {name: _shard_of(name, p) for name, p in model.named_parameters()}


def _shard_of(name: str, p: Any) -> Shard:
    if not is_spread(p):
        return Shard(0, 0, (p.shape[0] if p.ndim else 1) if rank_and_count()[0] == 0 else 0)
    mesh, split = p.device_mesh, [i for i, placed in enumerate(p.placements) if not placed.is_replicate()]
    if len(split) != 1 or type(p.placements[split[0]]).__name__ != "Shard" or mesh.size() != rank_and_count()[1]:
        raise ValueError(
            f"{name} is spread over ranks as {p.placements} of {mesh}: use fully_shard alone, over all ranks, without "
            "tensor parallelism"
        )
    if p.to_local().device.type != mesh.device_type:
        raise ValueError(f"{name} is offloaded to the {p.to_local().device.type}: shard without an offload_policy")
    copies = [mesh.get_local_rank(i) for i in range(mesh.ndim) if i != split[0]]
    held = _held_of(p)
    return Shard(held.dim, held.start, 0) if any(copies) else held


def _held_of(p: Any) -> Shard:
    """What this rank holds of a parameter: all ranks but the last ones have as much."""
    at = next(i for i, placed in enumerate(p.placements) if not placed.is_replicate())
    dim, mesh = p.placements[at].dim, p.device_mesh
    step = -(-p.shape[dim] // mesh.size(at))
    start = min(mesh.get_local_rank(at) * step, p.shape[dim])
    return Shard(dim, start, min(step, p.shape[dim] - start))


@dataclass
class BorrowedShards:
    """Gradients of a sharded model's parameters, each rank's part of them.

    parameters: plain stand-ins in the shards' memory, which get the gradients. Every rank walks the same samples:
    FSDP2 then gives each the mean over ranks of the same gradient, which is that of the whole model.
    """

    parameters: dict[str, nn.Parameter]
    _held: dict[str, nn.Parameter] = field(repr=False)

    def backward(self, loss: Tensor, inputs: Sequence[nn.Parameter] | None = None) -> None:
        """As ``loss.backward(inputs=inputs)`` for the stand-ins, whose hooks are called once all gradients are there.

        Before that FSDP2 may still be at work on them, on a stream of its own. Raises RuntimeError where there is no
        gradient at all.
        """
        loss.backward()
        found = {name: p.grad for name, p in self._held.items() if p.grad is not None}
        if not found:
            raise RuntimeError(
                "backward left no gradients in the shards: call set_requires_gradient_sync(True) of the model"
            )
        wanted = None if inputs is None else {id(p) for p in inputs}
        for name, grad in found.items():
            self._held[name].grad = None
            p = self.parameters[name]
            if wanted is not None and id(p) not in wanted:
                continue
            part = local(grad)
            p.grad = part if p.grad is None else p.grad + part
            for hook in (p._post_accumulate_grad_hooks or {}).values():
                hook(p)


@contextmanager
def borrowed_shards(model: nn.Module, names: tuple[str, ...]) -> Iterator[BorrowedShards]:
    """A sharded model in evaluation mode, in which the parameters ``names`` alone have gradients.

    The user's gradients, gradient hooks and ``requires_grad`` are put away and come back, as do modes, also after an
    error.
    """
    reshard(model)
    wanted = set(names)
    kept = [(p, p.requires_grad, p.grad, p._post_accumulate_grad_hooks) for p in model.parameters()]
    training = [(module, module.training) for module in model.modules()]
    ended = False
    try:
        held = {}
        for name, p in model.named_parameters():
            p.grad, p._post_accumulate_grad_hooks = None, None  # type: ignore[assignment]
            p.requires_grad_(name in wanted)
            if name in wanted:
                held[name] = p
        for module, _ in training:
            module.training = False
        yield BorrowedShards({n: nn.Parameter(local(p).detach()) for n, p in held.items()}, held)
        ended = True
    finally:
        if not ended:
            _begin_anew(model)
        reshard(model)
        for p, required, grad, hooks in kept:
            p.requires_grad_(required)
            p.grad, p._post_accumulate_grad_hooks = grad, hooks
        for module, flag in training:
            module.training = flag


def _begin_anew(model: nn.Module) -> None:
    """FSDP2 forgets a forward or backward that was broken off."""
    for module in fsdp_modules(model):
        with suppress(AttributeError, RuntimeError):  # not in older versions of PyTorch; not a root
            module.reset_iter_state()


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of a sharded model as it was before ``fully_shard``, for walks on meta: its parameters have the whole
    shapes, but no values and no memory. Other models as they are."""
    sharded = {id(m): m for m in fsdp_modules(model)}
    if not sharded:
        return model
    reshard(model)
    memo: dict[int, Any] = {id(p): nn.Parameter(hollow(p), requires_grad=p.requires_grad) for p in model.parameters()}
    for module in model.modules():
        computed = [v for v in vars(module).values() if isinstance(v, Tensor) and not v.is_leaf]
        memo |= {id(v): v.detach().clone() for v in computed}  # by the last forward; these can't be copied
        kind = type(module)
        if id(module) in sharded:
            kind = kind.__mro__[getattr(kind, "_orig_cls_mro_index", 2)]
        memo[id(module)] = object.__new__(kind)
    for module in model.modules():
        kept = {k: v for k, v in vars(module).items() if not (k.startswith(_LEFT) or _is_of_fsdp(v))}
        own = {name: _without_hooks(value) for name, value in kept.items()}
        vars(memo[id(module)]).update(copy.deepcopy(own, memo))
    found: nn.Module = memo[id(model)]
    return found


def whole_model(model: nn.Module) -> nn.Module | None:
    """A copy of a sharded model with all of its weights, in the first rank's memory on the CPU; None on other ranks.

    All ranks have to call it; the parameters come one after the other. Other models as they are.
    """
    if not fsdp_modules(model):
        return model
    found, first = skeleton(model), rank_and_count()[0] == 0
    for mine, empty in zip(model.parameters(), found.parameters()):
        full = whole(mine.detach())
        if first:
            empty.data = full.to("cpu", copy=not is_spread(mine))
    return found.cpu() if first else None


def hollow(p: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """A tensor of ``p``'s shape, or another one, where ``p`` is, without values and memory."""
    return torch.empty((), dtype=p.dtype, device=local(p).device).expand(p.shape if shape is None else shape)


def _without_hooks(value: Any) -> Any:
    """A module's table of hooks without FSDP2's; everything else as it is."""
    if type(value) is OrderedDict and any(map(_is_of_fsdp, value.values())):
        return OrderedDict((k, hook) for k, hook in value.items() if not _is_of_fsdp(hook))
    return value


def _is_of_fsdp(value: Any) -> bool:
    """Whether it is a function or bound method (a hook, a forward method) of FSDP2's."""
    value = getattr(value, "hook", value)
    if not (inspect.isroutine(value) or isinstance(value, MethodType)):
        return False
    return (getattr(inspect.unwrap(value), "__module__", None) or "").startswith(_FSDP)
