"""What stands in a model where a residual block was."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..plan.blocks import Returns


class Passthrough(nn.Module):
    """Hands on the inputs that a residual block would have added something to; it has no weights.

    arguments: the names of the block's forward arguments, in order. returns: which of them it hands on.
    """

    def __init__(self, arguments: tuple[str, ...], returns: Returns) -> None:
        super().__init__()
        self.arguments, self.returns = arguments, returns

    @classmethod
    def of(cls, block: nn.Module, returns: Returns) -> Passthrough:
        """In the place of ``block``, in its mode. Raises ValueError where its forward doesn't take what it returns."""
        arguments = tuple(inspect.signature(block.forward).parameters)
        unknown = set(_names(returns)) - set(arguments)
        if unknown:
            raise ValueError(f"{type(block).__name__}.forward takes no argument {sorted(unknown)[0]!r}")
        return cls(arguments, returns).train(block.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._picked(self.returns, {**dict(zip(self.arguments, args)), **kwargs})

    def _picked(self, returns: Returns, given: Mapping[str, Any]) -> Any:
        if isinstance(returns, list):
            return tuple(self._picked(r, given) for r in returns)
        return None if returns is None else given[returns]

    def extra_repr(self) -> str:
        return f"returns={self.returns!r}"


def _names(returns: Returns) -> Iterator[str]:
    if isinstance(returns, list):
        for r in returns:
            yield from _names(r)
    elif isinstance(returns, str):
        yield returns
    elif returns is not None:
        raise ValueError(f"{returns!r} names no argument")


def dropped_blocks(model: nn.Module) -> dict[str, Returns]:
    """The places where blocks were dropped, with what stands there: plain JSON values."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module.returns for name, module in modules if isinstance(module, Passthrough)}


def drop_again(model: nn.Module, dropped: Mapping[str, Returns]) -> None:
    """Put passthroughs where :func:`dropped_blocks` found them, in a model that has the blocks.

    Raises ValueError or AttributeError for a place that isn't there, or one that can't hand on what is asked.
    """
    for name, returns in dropped.items():
        path, _, leaf = name.rpartition(".")
        block = model.get_submodule(name)
        if not name or next(block.parameters(), None) is None:
            raise ValueError(f"{name!r} is no block with weights")
        model.get_submodule(path)._modules[leaf] = Passthrough.of(block, returns)
