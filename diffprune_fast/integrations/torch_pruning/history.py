"""Which channels Torch-Pruning left of a model, from its history: what compensation has to know."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .acceleration import accelerate
from .library import tp


def kept_from_history(
    dense: nn.Module, history: Sequence[Any], example_inputs: Any, **build: Any
) -> dict[tuple[str, int], np.ndarray]:
    """The indices that Torch-Pruning kept, from the model as it was and ``pruner.pruning_history()``.

    The history is played on a copy of the model without data, so it takes neither weights nor memory for them, and says
    the same however long the pruned model was trained since.

    Args:
        dense: the model before pruning.
        history: what ``pruning_history()`` of the pruner, or of the dependency graph, gives.
        example_inputs: what the pruner was given.
        build: further arguments of ``build_dependency`` that it was given (``customized_pruners``, ``forward_fn``, …).

    Returns:
        ``(parameter, dim)`` to the ``(n,)`` indices of the dense parameter that are left, as
        :func:`~diffprune_fast.compensate` takes them; places that kept all are missing.

    Raises:
        ValueError: the history is of another model.

    Example:
        >>> import copy, torch, torch_pruning as tp
        >>> dense = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
        >>> x, model = torch.randn(8, 4), copy.deepcopy(dense)
        >>> graph = tp.DependencyGraph().build_dependency(model, x)
        >>> graph.get_pruning_group(model[0], tp.prune_linear_out_channels, [0, 3]).prune()
        >>> kept = kept_from_history(dense, graph.pruning_history(), x)
        >>> kept["2.weight", 1]
        array([1, 2, 4, 5])
    """
    twin = _on_meta(dense)
    try:
        graph = tp.DependencyGraph().build_dependency(twin, _moved(example_inputs), verbose=False, **build)
    except Exception:  # a forward that looks at values
        twin = copy.deepcopy(dense)
        graph = tp.DependencyGraph().build_dependency(twin, example_inputs, verbose=False, **build)
    with accelerate() as inside:
        try:
            graph.load_pruning_history(list(history))
        except (AttributeError, IndexError, KeyError, RuntimeError) as error:
            raise ValueError(
                f"this history isn't one of {type(dense).__name__}: give the model as it was before the first step, "
                f"and what the pruner was given ({error})"
            ) from error
        return inside.kept(twin)


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy without data."""
    frozen = not any(p.requires_grad for p in model.parameters())  # a graph needs something that gradients flow to
    memo: dict[int, Any] = {}
    for t in chain(model.parameters(), model.buffers()):
        empty = torch.empty_like(t, device="meta")
        held = isinstance(t, nn.Parameter)
        memo[id(t)] = nn.Parameter(empty, requires_grad=t.requires_grad or frozen) if held else empty
    return copy.deepcopy(model, memo)


def _moved(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.to("meta")
    if isinstance(tree, Mapping):
        return {key: _moved(value) for key, value in tree.items()}
    return type(tree)(_moved(value) for value in tree) if type(tree) in (tuple, list) else tree
