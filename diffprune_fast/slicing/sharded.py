"""A model that FSDP2 has sharded is pruned into another one: parameter after parameter gathered, sliced, sharded anew.

In place it can't be done soundly. What FSDP2 keeps of a parameter beside its shard (the padded memory that is gathered
from, the whole parameter's sizes, the buffers it is gathered into) is made once, in ``fully_shard``, and is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..choices import NormGroups
from ..objective.shards import hollow, local, reshard, shards_of, skeleton, spread_like, whole
from ..plan.plan import Plan
from ..pruned.held_tensors import tables
from ..result import PruneResult
from .execute import Factor, row_scale, scale_factors
from .prune import dry_run, prepared
from .verify import SliceError


def prune_sharded(
    model: nn.Module,
    plan: Plan,
    keep: Mapping[str, np.ndarray],
    shard: Callable[[nn.Module], Any],
    *,
    norm_groups: NormGroups = "count",
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
) -> PruneResult:
    """A smaller model, sharded as well, from one that ``fully_shard`` has spread over ranks; the model stays as it is.

    All ranks make the same call. Each parameter is gathered, sliced and spread again before the next one: beside both
    models' shards no rank holds more than one whole parameter and its slice. Gradients and optimiser state are not
    taken along, and no real forward proves the slicing: the walk on ``meta`` does.

    Args:
        model: the model that ``plan`` was traced from, or one of its class that was, before it was sharded.
        plan: what :func:`trace` gave, of the sharded model or the whole one.
        keep: as for :func:`prune`.
        shard: calls ``fully_shard`` on the smaller model and its parts, as it was called on ``model``; the parameters
            are on ``meta`` then.
        norm_groups, example_inputs: as for :func:`prune`.

    Returns:
        As :func:`prune`; ``result.model`` is sharded.

    Raises:
        SliceError: the keep-set, the plan and the model don't fit one another, or the model has weight_norm, whose
            gains need whole directions.
        ValueError: ``model`` isn't sharded, or not by ``fully_shard`` alone.

    Example::

        def shard(model):
            for block in [*model.down_blocks, model.mid_block, *model.up_blocks]:
                fully_shard(block)
            fully_shard(model)

        shard(unet)
        plan = trace(unet)
        scores = score(unet, loader, plan)
        result = prune_sharded(unet, plan, select(plan, scores, macs=0.5).keep, shard)
        finetune(result.model, loader, steps=1000)
    """
    if shards_of(model) is None:
        raise ValueError(f"{type(model).__name__} isn't sharded by fully_shard: use prune")
    if plan.norm_fixes:
        raise SliceError(
            "weight_norm's gains follow whole rows, which no rank has: take the norm out of the weights before "
            "sharding (torch.nn.utils.parametrize.remove_parametrizations)"
        )
    smaller = skeleton(model)
    sliced = dry_run(smaller, plan, keep, norm_groups=norm_groups, example_inputs=example_inputs)
    indices: dict[str, dict[int, Tensor]] = {}
    for (name, dim), index in sliced.kept.items():
        indices.setdefault(name, {})[dim] = torch.from_numpy(index)
    factors: dict[str, list[Factor]] = {}
    for name, rows, factor in scale_factors(smaller, plan, sliced):
        factors.setdefault(name, []).append((rows, factor))
    of_dense = dict(smaller.named_parameters())
    lost = {name: hollow(of_dense[name], sliced.shapes[name]) for name in indices if name in of_dense}
    result = prepared(smaller, plan, sliced, norm_groups, None, "reference", solved=lost).made()
    device = next(smaller.parameters()).device
    _to_meta(smaller)
    shard(smaller)
    smaller._apply(lambda t: torch.empty_like(t, device=device) if t.device.type == "meta" else t)
    reshard(model)
    with torch.no_grad():
        for (name, p), q in zip(model.named_parameters(), smaller.parameters()):
            value = _sliced(whole(p.detach()), indices.get(name, {}), factors.get(name, []))
            local(q.detach()).copy_(local(spread_like(value, q)))
    return result


def _sliced(value: Tensor, keep: Mapping[int, Tensor], factors: list[Factor]) -> Tensor:
    scale = row_scale(value, dict(keep), factors)
    for dim, index in keep.items():
        value = value.index_select(dim, index.to(value.device))
    if scale is None:
        return value
    by = scale.to(value.device).view(-1, *[1] * (value.dim() - 1))
    return (value.double() * by).to(value.dtype)


def _to_meta(model: nn.Module) -> None:
    """Parameters without memory, tied as they were; buffers keep theirs."""
    made: dict[int, nn.Parameter] = {}
    for _, table, key, p in list(tables(model)):
        if isinstance(p, nn.Parameter):
            if id(p) not in made:
                empty = torch.empty(p.shape, dtype=p.dtype, device="meta")
                made[id(p)] = nn.Parameter(empty, requires_grad=p.requires_grad)
            table[key] = made[id(p)]
