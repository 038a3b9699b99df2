"""What a forward asks of its inputs' values: computed where it does, from the inputs and from numbers alone.

Activations have no values in a walk. ``if (image_embeds == 0).all()`` needs none of theirs: how such a tensor was made
is remembered, and made again with the real inputs when a forward reads it. Nothing is computed that isn't read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

from .notes import Origin, note_on, read_note

Writes = Mapping[int, int]  # a storage to when something was written into it last


def storage_of(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def remember_input(on_meta: Tensor, given: Tensor) -> None:
    """A floating-point input that is on meta in the walk; what is on meta already has no values to remember."""
    if not given.is_meta:
        note_on(on_meta).origin = Origin(0, None, (), {}, given)


def note_origin(func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor], out: Any, now: int) -> None:
    """Remember how a tensor without channels was made, if of known values and not by chance."""
    if not isinstance(out, Tensor) or not out.is_meta or func._schema.is_mutable:
        return
    if torch.Tag.nondeterministic_seeded in func.tags or read_note(out).labels is not None:
        return
    if all(not t.is_meta or read_note(t).origin is not None for t in tensors):
        note_on(out).origin = Origin(now, func, args, kwargs)


def computed(func: Any, args: Any, kwargs: Any, writes: Writes) -> Any:
    """The operation with real values in place of its operands; None where they aren't known."""
    with torch.utils._python_dispatch._disable_current_modes():
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
    if not t.is_meta:
        return t
    origin = read_note(t).origin
    if origin is None or writes.get(storage_of(t), -1) > origin.at:
        raise _Unknown
    if origin.value is None:
        tensors: list[Tensor] = []
        tree_map_only(Tensor, tensors.append, (origin.args, origin.kwargs))
        if any(writes.get(storage_of(x), -1) > origin.at for x in tensors):
            raise _Unknown
        origin.value = origin.func(*_real(origin.args, writes), **_real(origin.kwargs, writes))
    return origin.value
