"""Finding the residual blocks of a model: the modules that can go without a change of any shape."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from ..architectures.inputs import calls_of
from ..plan.blocks import Block, Returns
from ..plan.plan import Complexity
from ..pruned.passthrough import Passthrough
from ..tracing.channels import Channels
from ..tracing.errors import TraceError
from ..tracing.graph import Graph
from ..tracing.records import Calls, CostTerm
from ..tracing.tracer import walk_forward
from .residual import find_returns


def find_blocks(model: nn.Module, example_inputs: tuple[Any, ...] | dict[str, Any] | None = None) -> tuple[Block, ...]:
    """The residual blocks of a model, in the order in which it holds them; blocks may hold others.

    A module counts if with zeros for weights it returns its input bit for bit, and the model runs without it: then
    leaving it out is what zeroing its branch is. No list of classes is consulted. The model runs on the meta device
    and every kind of block once by itself; nothing of it changes.

    Args:
        model: any module.
        example_inputs: as for :func:`trace`.

    Returns:
        Blocks by their paths in the model, with their parameters and MACs.

    Raises:
        ValueError: no example inputs are known for this class.
        TraceError: the forward can't be followed.

    Example:
        >>> class Residual(nn.Sequential):
        ...     def forward(self, x):
        ...         return x + super().forward(x)
        >>> model = nn.Sequential(nn.Linear(4, 8), Residual(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
        >>> [(block.name, block.params) for block in find_blocks(model, (torch.zeros(1, 4),))]
        [('1', 144)]
    """
    calls = calls_of(model, example_inputs)
    seen = _Calls(model)
    costs = costs_of_forward(model, calls, seen)
    known: dict[Any, Returns] = {}
    found: dict[str, Returns] = {}
    for name, module in model.named_modules():
        if name and name in seen.first and next(module.parameters(), None) is not None:
            key = _kind(module, seen.first[name])
            if key not in known:
                known[key] = find_returns(module, *seen.first[name]) if seen.may_be(name) else None
            if known[key] is not None:
                found[name] = known[key]
    found = {n: r for n, r in found.items() if n in _removable(model, calls, found)}
    return tuple(_describe(model, name, returns, costs) for name, returns in found.items())


def costs_of_forward(model: nn.Module, calls: Calls, seen: _Calls | None = None) -> list[CostTerm]:
    """What a forward on meta costs; ``seen`` notes the calls of its modules.

    Raises TraceError where the forward can't be followed.
    """
    channels = Channels.of(model)
    handle = register_module_forward_hook(seen.note, with_kwargs=True) if seen is not None else None
    try:
        return walk_forward(model, channels, Graph(channels.total), calls).costs
    finally:
        if handle is not None:
            handle.remove()


def macs_of(costs: Sequence[CostTerm], name: str = "") -> int:
    """Multiply-accumulates of everything below a module; attention's products are left out, as in the plan."""
    terms = [c for c in costs if not c.attention and (not name or c.place.startswith((name + ".", name + " ")))]
    return sum(c.scale * math.prod(x.size for x in c.maps) for c in terms)


def complexity_of(model: nn.Module, calls: Calls) -> Complexity:
    return Complexity(sum(p.numel() for p in model.parameters()), macs_of(costs_of_forward(model, calls)))


@contextmanager
def passthroughs_for(model: nn.Module, blocks: Mapping[str, Returns]) -> Iterator[None]:
    """The model with passthroughs in the places of blocks, for as long as this lasts."""
    undo = put_passthroughs(model, blocks)
    try:
        yield
    finally:
        undo()


def put_passthroughs(model: nn.Module, blocks: Mapping[str, Returns]) -> Any:
    """Put passthroughs wherever the model holds these blocks; returns the function that puts the blocks back."""
    modules = dict(model.named_modules())
    instead = {id(modules[name]): Passthrough.of(modules[name], returns) for name, returns in blocks.items()}
    done = []
    for owner in modules.values():
        for key, child in owner._modules.items():
            if id(child) in instead:
                done.append((owner, key, child))
    for owner, key, child in done:
        owner._modules[key] = instead[id(child)]

    def undo() -> None:
        for owner, key, child in done:
            owner._modules[key] = child

    return undo


class _Calls:
    """The first call of every module: what it was given, and the shapes of what it returned."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(m): n for n, m in model.named_modules()}
        self.first: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._returned: dict[str, list[Any]] = {}

    def note(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name = self._names.get(id(module))
        if name is not None and name not in self.first:
            self.first[name] = (tuple(args), dict(kwargs))
            leaves = list(output) if type(output) in (tuple, list) else [output]
            self._returned[name] = [x.shape if isinstance(x, Tensor) else x for x in leaves]

    def may_be(self, name: str) -> bool:
        """Whether everything that was returned has the shape of something that was given."""
        args, kwargs = self.first[name]
        given = [x.shape for x in [*args, *kwargs.values()] if isinstance(x, Tensor)]
        returned = [x for x in self._returned[name] if x is not None]
        return bool(returned) and all(x in given if isinstance(x, torch.Size) else type(x) is tuple for x in returned)


def _kind(module: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """Equal for blocks that differ in their weights' values alone, so that one of them is tried for all."""
    plain = (bool, int, float, str, tuple, type(None))
    own = [(n, sorted((k, repr(v)) for k, v in vars(m).items() if type(v) in plain)) for n, m in module.named_modules()]
    shapes = [(n, tuple(p.shape)) for n, p in module.named_parameters()]
    return type(module), repr(module), repr(own), repr(shapes), repr(_describe_call(call))


def _describe_call(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tuple(tree.shape), tree.dtype
    if isinstance(tree, dict):
        return {k: _describe_call(v) for k, v in tree.items()}
    return [_describe_call(x) for x in tree] if isinstance(tree, (list, tuple)) else repr(type(tree))


def _removable(model: nn.Module, calls: Calls, blocks: Mapping[str, Returns]) -> set[str]:
    """Those without which the model runs: some forwards look into a block before they call it.

    Tried all at once, level by level; where that fails, in halves.
    """

    def depth(name: str) -> int:
        return sum(name.startswith(other + ".") for other in blocks)

    def tried(names: list[str]) -> set[str]:
        if not names:
            return set()
        try:
            with passthroughs_for(model, {n: blocks[n] for n in names}):
                costs_of_forward(model, calls)
            return set(names)
        except TraceError:
            half = len(names) // 2
            return tried(names[:half]) | tried(names[half:]) if half else set()

    levels = {depth(n) for n in blocks}
    return {n for level in sorted(levels) for n in tried([b for b in blocks if depth(b) == level])}


def _describe(model: nn.Module, name: str, returns: Returns, costs: Sequence[CostTerm]) -> Block:
    block = model.get_submodule(name)
    inside = {id(m) for m in block.modules()}
    elsewhere = {id(p) for m in model.modules() if id(m) not in inside for p in m._parameters.values()}
    params = sum(p.numel() for p in block.parameters() if id(p) not in elsewhere)
    return Block(name, type(block).__name__, params, macs_of(costs, name), returns)
