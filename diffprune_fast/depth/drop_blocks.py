"""Taking residual blocks out of a model, with everything as it was if that fails."""

from __future__ import annotations

import copy
import difflib
import itertools
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import translate
from typing import Any

import torch
from torch import nn

from ..architectures.configs import build_on_meta, own_config, shapes_of
from ..architectures.inputs import calls_of
from ..checkpoint.saving import replace_save_pretrained
from ..plan.blocks import Block
from ..plan.plan import Complexity
from ..pruned.passthrough import Passthrough
from ..pruned.record import attach_record, before_pruning
from ..result import PruneResult, record
from ..slicing.optimizers import check_optimizer
from ..tracing.errors import TraceError
from ..tracing.trace import trace
from .find_blocks import complexity_of, find_blocks, put_passthroughs, walked
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

    names: blocks as :func:`score_blocks` and :func:`find_blocks` name them, or patterns (``fnmatch``). optimizer: the
    dropped parameters are taken out of it. ``inplace=False`` drops from a copy.

    Where a list of blocks can be closed up so that a shorter config describes the model (``num_layers``), it is, and
    the class's own ``from_pretrained`` loads it. Elsewhere (skip connections, blocks that are counted) a
    :class:`Passthrough` without weights stays in the block's place, and :func:`from_pretrained` puts it there again.

    Raises:
        DepthError: a name that is no residual block of this model. SliceError: the optimizer isn't this model's.
        TraceError: the model can't be followed.
    """
    check_optimizer(model, optimizer, inplace)
    if not inplace:
        model = copy.deepcopy(model)
    blocks = find_blocks(model, example_inputs)
    chosen = named(blocks, [names] if isinstance(names, str) else names)
    before = complexity_of(model, calls_of(model, example_inputs))
    old = list(model.parameters())
    with without(model, chosen, example_inputs):
        plan = trace(model, example_inputs)
    if optimizer is not None:
        forget(optimizer, old, model)
    attach_record(model, before_pruning(model, plan))
    replace_save_pretrained(model)
    after = Complexity(plan.params(), plan.macs())
    return record(PruneResult(model, plan, {}, before, after, dropped=tuple(b.name for b in chosen)))


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


@contextmanager
def without(
    model: nn.Module, blocks: Sequence[Block], example_inputs: tuple[Any, ...] | dict[str, Any] | None
) -> Iterator[None]:
    """Drop blocks for good; if anything is raised inside, every list, block and config is as it was."""
    calls = calls_of(model, example_inputs)
    modules = [(m, dict(m._modules)) for m in model.modules()]
    config = vars(model).get("_internal_dict")
    try:
        put_passthroughs(model, {b.name: b.returns for b in blocks})
        try:
            walked(model, calls)
        except TraceError as error:
            raise DepthError(
                f"{type(model).__name__} doesn't run without {', '.join(b.name for b in blocks)}: {error}"
            ) from error
        _close_up(model, calls)
        yield
    except BaseException:
        for module, children in modules:
            module._modules.clear()
            module._modules.update(children)
        if config is not None:
            vars(model)["_internal_dict"] = config
        raise


def forget(optimizer: torch.optim.Optimizer, old: Sequence[nn.Parameter], model: nn.Module) -> None:
    """Take the parameters that a model no longer has out of its optimiser."""
    gone = {id(p) for p in old} - {id(p) for p in model.parameters()}
    for group in optimizer.param_groups:
        for p in [p for p in group["params"] if id(p) in gone]:
            optimizer.state.pop(p, None)
        group["params"][:] = [p for p in group["params"] if id(p) not in gone]


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
