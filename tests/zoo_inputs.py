"""How the zoo's cases are made: random inputs in float64, a batch of two to run and of one to trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from models import Case
from torch import Tensor, nn

Inputs = Callable[[int], dict[str, Any]]  # batch size -> keyword arguments of the forward


def random(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def timesteps(batch: int) -> Tensor:
    return torch.tensor([3, 500])[:batch]


def _tensors(output: Any) -> Iterable[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)


def flat(output: Any) -> Tensor:
    """Everything a forward returned, as one vector."""
    return torch.cat([t.reshape(-1) for t in _tensors(output)])


def _on_meta(tree: Any) -> Any:
    """Shapes only, where values don't count: floating-point tensors go to meta."""
    if isinstance(tree, Tensor):
        return torch.empty_like(tree, device="meta") if tree.is_floating_point() else tree
    if isinstance(tree, dict):
        return {k: _on_meta(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)([_on_meta(v) for v in tree])
    return tree


def case(name: str, make: Callable[[], nn.Module], inputs: Inputs, real: tuple[str, ...] = ()) -> Case:
    """``real``: floating-point inputs that stay real for tracing (the forward reads their values)."""
    example = {k: v if k in real else _on_meta(v) for k, v in inputs(1).items()}
    return Case(name, make, lambda m: flat(m(**inputs(2))), example)  # type: ignore[arg-type]


def built(kind: Any, **config: Any) -> Callable[[], nn.Module]:
    return lambda: kind(**config)


def text_mask(batch: int, length: int = 7) -> Tensor:
    """The second caption is shorter."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1:, length - 2 :] = 0
    return mask


HEADS: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 8}
