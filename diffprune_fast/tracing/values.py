"""What a forward asks of its inputs' values: computed where it does, from the inputs and from numbers alone.

Activations have no values in a walk. ``if (image_embeds == 0).all()`` needs none of theirs: how such a tensor was made
is remembered, and made again with the real inputs when a forward reads it. Nothing is computed that isn't read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

from .labels import Labels
from .notes import Origin, note_on, read_note


def _storage_of(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _written(func: Any, args: Sequence[Any], kwargs: Any) -> list[Tensor]:
    """The operands that an operation writes into."""
    written: list[Tensor] = []
    for argument, value in zip(func._schema.arguments, [*args, *[None] * len(func._schema.arguments)]):
        if argument.alias_info is not None and argument.alias_info.is_write:
            tree_map_only(Tensor, written.append, kwargs.get(argument.name, value))
    return written


@dataclass
class Writes:
    """What a walk has written to.

    last: a storage to the number of the step that wrote into it last. labels: to those of what was written last.
    unreal: storages of real tensors into which something without values was written. held: all of them, lest others
    get their address.
    """

    last: dict[int, int] = field(default_factory=dict)
    labels: dict[int, Labels | None] = field(default_factory=dict)
    unreal: set[int] = field(default_factory=set)
    held: list[Any] = field(default_factory=list)

    def note(self, func: Any, args: Sequence[Any], kwargs: Any, tensors: Sequence[Tensor], now: int) -> None:
        """An operation on these tensors, which writes into some of them."""
        written = _written(func, args, kwargs)
        self.held += [t.untyped_storage() for t in written]
        self.last.update([(_storage_of(t), now) for t in written])
        if any(self.without_values(t) for t in tensors):
            self.unreal.update([_storage_of(t) for t in written if not t.is_meta])

    def note_labels(self, func: Any, args: Sequence[Any], kwargs: Any) -> None:
        """The same operation, once it has run: what it has written into has its labels by now."""
        self.labels.update([(_storage_of(t), read_note(t).labels) for t in _written(func, args, kwargs)])

    def labels_in(self, t: Tensor) -> Labels | None:
        """The labels of what was written last into the memory that a tensor lies in; its own where nothing was."""
        return self.labels.get(_storage_of(t), read_note(t).labels)

    def without_values(self, t: Tensor) -> bool:
        return t.is_meta or (bool(self.unreal) and _storage_of(t) in self.unreal)

    def since(self, tensors: Iterable[Tensor], at: int) -> bool:
        return any(self.last.get(_storage_of(t), -1) > at for t in tensors)


def remember_input(on_meta: Tensor, given: Tensor) -> None:
    """A floating-point input that is on meta in the walk; what is on meta already has no values to remember."""
    if not given.is_meta:
        note_on(on_meta).origin = Origin(0, None, (), {}, given)


def note_origin(
    func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor], out: Any, now: int, writes: Writes
) -> None:
    """Remember how a tensor without channels was made, if of known values and not by chance."""
    if not isinstance(out, Tensor) or read_note(out).labels is not None:  # nearly always
        return
    if not out.is_meta or func._schema.is_mutable:
        return
    if torch.Tag.nondeterministic_seeded in func.tags or "empty" in func.overloadpacket.__name__:
        return
    if all(not writes.without_values(t) or read_note(t).origin is not None for t in tensors):
        note_on(out).origin = Origin(now, func, args, kwargs)


def computed(func: Any, args: Any, kwargs: Any, writes: Writes) -> Any:
    """The operation with real values in place of its operands; None where they aren't known, or it writes."""
    if func._schema.is_mutable:
        return None
    try:
        return func(*_real(args, writes), **_real(kwargs, writes))
    except Exception:
        return None


class _Unknown(Exception):
    """Values that aren't known."""


def _real(tree: Any, writes: Writes) -> Any:
    cpu = torch.device("cpu")
    tree = tree_map_only(Tensor, lambda t: _value(t, writes), tree)
    return tree_map(lambda x: cpu if isinstance(x, torch.device) else x, tree)


def _value(t: Tensor, writes: Writes) -> Tensor:
    if not writes.without_values(t):
        return t
    origin = read_note(t).origin
    if origin is None or writes.since([t], origin.at):
        raise _Unknown
    if origin.value is None:
        tensors: list[Tensor] = []
        tree_map_only(Tensor, tensors.append, (origin.args, origin.kwargs))
        if writes.since(tensors, origin.at):
            raise _Unknown
        origin.value = origin.func(*_real(origin.args, writes), **_real(origin.kwargs, writes))
    return origin.value
