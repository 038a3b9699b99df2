"""FlexAttention: a product of queries, keys and values whose scores pass through the user's functions.

It is followed as ``scaled_dot_product_attention``. The functions are called once, for one score, so that what they read
is followed too; where one asks which head it is called for, the heads stay, because they are known by their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .walk import Walk

_compiling: set[type] = set()  # classes of models that compile something in their forward


class _Head(Tensor):
    """The number of a head, which remembers whether anything was made of it."""

    asked: bool

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, _Head):
                x.asked = True
        with torch._C.DisableTorchFunctionSubclass():
            args, kwargs = tree_map_only(_Head, lambda t: t.as_subclass(Tensor), (args, kwargs))
        return func(*args, **kwargs)


def compiles(model: nn.Module, error: Exception) -> bool:
    """Whether a forward failed because it compiles something, which nothing can look into: the next time it doesn't."""
    found = "torch.compile" in str(error) and type(model) not in _compiling and hasattr(torch.compiler, "set_stance")
    if found:
        _compiling.add(type(model))
    return found


@contextmanager
def not_compiled(model: nn.Module) -> Iterator[None]:
    """What a model compiles in its forward, as FlexAttention is, runs as it is written."""
    if type(model) not in _compiling:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def is_flex_attention(func: Any) -> bool:
    return isinstance(func, HigherOrderOperator) and func.name() == "flex_attention"


def follow_flex_attention(walk: Walk, tracer: TorchDispatchMode, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The outputs of a call with these arguments."""
    query, key, value, score_mod, block_mask, scale, options = args[:7]
    heads = _of_heads(tracer, query, score_mod, block_mask[-1])
    if heads is None and any(isinstance(t, Tensor) and t.dim() > 1 and t.shape[1] > 1 for t in block_mask):
        heads = "has a mask of its own"
    if heads is None and (options.get("OUTPUT_LOGSUMEXP", True) or options.get("OUTPUT_MAX", False)):
        heads = "gives a number of its own"
    if heads is not None:
        for t in (query, key, value):
            walk.freeze_dims(t, [1], f"is of a head that {heads} in {walk.module or 'model'} (flex_attention)")
    # Where the scale follows the head size, the queries take its change; a constant one stays.
    told = {} if math.isclose(scale, query.shape[-1] ** -0.5, rel_tol=1e-9) else {"scale": scale}
    grouped = {"enable_gqa": True} if key.shape[1] != query.shape[1] else {}
    operation = torch.ops.aten.scaled_dot_product_attention.default
    out = tracer.__torch_dispatch__(operation, (), (query, key, value), {**told, **grouped})
    numbers = [query.new_empty(query.shape[:-1], dtype=torch.float32) for _ in range(2)]
    return (out, *numbers[: 2 if hasattr(torch.nn.attention.flex_attention, "AuxRequest") else 1])


def _of_heads(tracer: TorchDispatchMode, query: Tensor, score_mod: Any, mask_mod: Any) -> str | None:
    """How the functions tell heads apart; what they do is followed."""
    for arguments, function in (((query.new_empty(()),), score_mod), ((), mask_mod)):
        head = torch.zeros((), dtype=torch.int32).as_subclass(_Head)
        head.asked = False
        batch, row, column = (torch.zeros((), dtype=torch.int32) for _ in range(3))
        with tracer:
            function(*arguments, batch, head, row, column)
        if head.asked:
            return "has a function of its own"
    return None
