"""Taking residual blocks out of a model, with everything as it was if that fails."""

from __future__ import annotations

import difflib
import itertools
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import translate
from functools import partial
from typing import Any

import torch
from torch import nn

from ..architectures.configs import build_on_meta, own_config, shapes_of
from ..architectures.inputs import calls_of
from ..checkpoint.saving import replace_save_pretrained
from ..ops.slice_channels import Step
from ..plan.blocks import Block
from ..pruned.held_tensors import copied
from ..pruned.passthrough import Passthrough
from ..pruned.record import before_pruning
from ..result import PruneResult
from ..slicing.commit import Change, undo
from ..slicing.optimizers import check_optimizer, forgetting
from ..tracing.errors import TraceError
from ..tracing.trace import trace
from .find_blocks import complexity_of, costs_of_forward, find_blocks, put_passthroughs
from .operations import computation


class DepthError(ValueError):
    """Blocks can't be dropped as asked. The model is as it was."""


def drop_blocks(
    model: nn.Module,
    names: str | Sequence[str],
    *,
    inplace: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
) -> PruneResult:
    """Remove whole residual blocks: the model computes what it would with their branches zeroed.

    Where a list of blocks can be closed up so that a shorter config describes the model (``num_layers``), it is, and
    the class's own ``from_pretrained`` loads it. Elsewhere (skip connections, blocks that are counted) a
    :class:`Passthrough` without weights stays in the block's place, and :func:`from_pretrained` puts it there again.

    Args:
        model: any module that :func:`find_blocks` finds blocks in.
        names: blocks as :func:`score_blocks` and :func:`find_blocks` name them, or patterns (``fnmatch``).
        inplace: False drops from a copy.
        optimizer: of the model's parameters; the dropped ones are taken out of it.
        example_inputs: as for :func:`trace`.

    Returns:
        The model without the blocks, and what it cost before and costs now.

    Raises:
        DepthError: a name is no residual block of this model.
        SliceError: the optimizer isn't this model's.
        TraceError: the model can't be followed.

    Example:
        >>> from diffusers import UNet2DModel
        >>> unet = UNet2DModel(8, block_out_channels=(8,), down_block_types=("DownBlock2D",),
        ...                    up_block_types=("UpBlock2D",), norm_num_groups=4, add_attention=False)
        >>> result = drop_blocks(unet, "mid_block.resnets.*")
        >>> result.dropped
        ('mid_block.resnets.0', 'mid_block.resnets.1')
        >>> result.after.params < result.before.params
        True
    """
    check_optimizer(model, optimizer, inplace)
    if not inplace:
        model = copied(model)
    blocks = find_blocks(model, example_inputs)
    chosen = named(blocks, [names] if isinstance(names, str) else names)
    before = complexity_of(model, calls_of(model, example_inputs))
    old = list(model.parameters())
    taken = put_back_steps(model)
    try:
        take_out(model, chosen, example_inputs)
        plan = trace(model, example_inputs)
        names = tuple(b.name for b in chosen)
        result = PruneResult(model, plan, {}, before, plan.complexity(), dropped=names)
        steps = [] if optimizer is None else forgetting(optimizer, old, model)
        change = Change(result, [*steps, partial(replace_save_pretrained, model)], before_pruning(model, plan))
        return change.made([taken.clear])
    except BaseException:
        undo(taken)
        raise


def named(blocks: Sequence[Block], patterns: Iterable[str]) -> list[Block]:
    """The blocks that patterns name, without those inside another one of them."""
    names = [b.name for b in blocks]
    found: set[str] = set()
    for pattern in patterns:
        matches = [n for n in names if re.match(translate(pattern), n)]
        if not matches:
            near = difflib.get_close_matches(pattern, names, 1, 0.5)
            hint = f"is it {near[0]!r}?" if near else f"its {len(names)} blocks are listed by find_blocks(model)"
            raise DepthError(f"{pattern!r} is no residual block of this model: {hint}")
        found.update(matches)
    chosen = [b for b in blocks if b.name in found]
    return [b for b in chosen if not any(other.holds(b) for other in chosen)]


def put_back_steps(model: nn.Module) -> list[Step]:
    """The calls that give a model the modules and the config which it has now."""
    steps: list[Step] = []
    for module in model.modules():
        steps += [module._modules.clear, partial(module._modules.update, dict(module._modules))]
    if "_internal_dict" in vars(model):
        steps.append(partial(vars(model).__setitem__, "_internal_dict", vars(model)["_internal_dict"]))
    return steps


def take_out(
    model: nn.Module, blocks: Sequence[Block], example_inputs: tuple[Any, ...] | dict[str, Any] | None
) -> None:
    """Drop blocks. If this raises they are partly gone: carry out the :func:`put_back_steps` of before."""
    calls = calls_of(model, example_inputs)
    put_passthroughs(model, {b.name: b.returns for b in blocks})
    try:
        costs_of_forward(model, calls)
    except TraceError as error:
        raise DepthError(
            f"{type(model).__name__} doesn't run without {', '.join(b.name for b in blocks)}: {error}"
        ) from error
    _close_up(model, calls)


def _close_up(model: nn.Module, calls: Any) -> None:
    """Delete passthroughs from their lists where a shorter config then describes the model, else leave them.

    The proof is the list of operations on meta: of the model with passthroughs, of the closed-up one, and of the one
    that the config builds. All three must be the same.
    """
    by_path = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and any(_is_gap(b) for b in m)}
    lists = list(by_path.values())
    in_lists = sum(_is_gap(b) for l in lists for b in l)
    if not hasattr(model, "register_to_config") or in_lists < sum(_is_gap(m) for m in model.modules()):
        return
    before = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
    lengths = {path: (len(l), sum(not _is_gap(b) for b in l)) for path, l in by_path.items()}
    open_lists = [dict(l._modules) for l in lists]
    for l in lists:
        stay = [b for b in l if not _is_gap(b)]
        l._modules.clear()
        l._modules.update({str(i): b for i, b in enumerate(stay)})
    renamed = {before[id(t)]: name for name, t in [*model.named_parameters(), *model.named_buffers()]}
    updates = _shorter_config(model, lengths)
    if updates is not None:
        try:
            fresh = _in_dtypes_of(model, build_on_meta(type(model), {**own_config(model), **updates}))
            closed = computation(model, calls)
            same = closed == computation(fresh, calls)
        except Exception:  # what a forward makes of a list of another length
            same = False
        if same and _with(lists, open_lists, lambda: computation(model, calls, renamed)) == closed:
            model.register_to_config(**updates)  # type: ignore[operator]
            return
    for l, children in zip(lists, open_lists):
        l._modules.clear()
        l._modules.update(children)


def _is_gap(module: nn.Module) -> bool:
    return isinstance(module, Passthrough)


def _shorter_config(model: nn.Module, lengths: Mapping[str, tuple[int, int]]) -> dict[str, Any] | None:
    """The config entries that count the lists, with their new values; None where no such config has these shapes.

    lengths: path of a list to its length before and after.
    """
    config, shapes = own_config(model), shapes_of(model)

    def built(updates: Mapping[str, Any]) -> nn.Module | None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return build_on_meta(type(model), {**config, **updates})
        except Exception:  # whatever a class makes of a config that isn't its own
            return None

    def counts(key: str, path: str, new: int) -> bool:
        shorter = dict((built({key: new}) or nn.Module()).named_modules()).get(path)
        return isinstance(shorter, nn.ModuleList) and len(shorter) == new

    entries = [
        [k for k, v in config.items() if type(v) is int and v == old and counts(k, path, new)]
        for path, (old, new) in lengths.items()
    ]
    for keys in itertools.product(*entries):
        updates = {key: new for key, (_, new) in zip(keys, lengths.values())}
        fresh = built(updates)
        if fresh is not None and shapes_of(fresh) == shapes:
            return updates
    return None


def _in_dtypes_of(model: nn.Module, fresh: nn.Module) -> nn.Module:
    theirs = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, t in [*fresh.named_parameters(), *fresh.named_buffers()]:
        t.data = torch.empty_like(t, dtype=theirs[name].dtype)
    return fresh


def _with(lists: Sequence[nn.ModuleList], children: Sequence[Mapping[str, Any]], work: Any) -> Any:
    """The result of ``work`` while the lists hold other children."""
    now = [dict(l._modules) for l in lists]
    try:
        for l, other in zip(lists, children):
            l._modules.clear()
            l._modules.update(other)
        return work()
    finally:
        for l, mine in zip(lists, now):
            l._modules.clear()
            l._modules.update(mine)
