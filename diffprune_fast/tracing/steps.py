"""What a forward computes besides its channels: a sliced model must use the same operations, numbers and sizes.

Labels follow channels; they don't see a number that was made of their count (``h / h.shape[1]``). So a walk notes
every operation with its numbers, and verification compares the sliced model's list with the unsliced model's. What
may differ is the length of a dim whose channels are labelled, and the arguments that only say such a length.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .constants import varying_shape
from .labels import Labels
from .notes import note_on, read_note
from .records import Step, _Sizes
from .walk import Walk

# Arguments that are sizes. Where they say the size of anything but labelled channels, the output's shape shows it.
_SIZES = "size shape sizes split_size split_sizes normalized_shape N C HxW length repeats steps"


_SIZES_OF = {
    "arange": "end",
    "slice": "end",
    "eye": "n m",
    "randperm": "n",
    "tile": "dims",
    "repeat_interleave": "output_size",
    "_reshape_alias": "stride",
    "empty_strided": "stride",
    "new_empty_strided": "stride",
    "group_norm": "num_groups",  # compared by itself: it follows the channels of an instance norm
    "native_group_norm": "group",
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), "groups"),  # verification compares their rows
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), "groups"),
}


_NOT_COMPUTED = "device layout pin_memory generator"


# They may be there or not depending on how a tensor lies in memory, and compute nothing.
_NOTHING = frozenset(("alias", "contiguous", "detach"))


# Along a dim that is constant it does not matter where they pick, or how long it is.
_PICKS = frozenset(("slice", "select", "narrow", "index_select"))


# A diagonal has as many equal entries as there are channels.
_ANY_SIZE = frozenset(("index_put_",))


# Real tensors that are larger are tables; what makes them is noted as well, unless they come from elsewhere (NumPy).
_SMALL = 4096


_NUMBERS = (int, float, bool, str, complex, torch.dtype)


_PLAIN = frozenset((*_NUMBERS, type(None)))


_LISTS = (list, tuple)


@cache
def _compared(op: Any) -> tuple[str, tuple[bool, ...], frozenset[str]]:
    """An op's name, which of its positional arguments count, and the names of those that don't."""
    name = op.overloadpacket.__name__
    ignored = frozenset(f"{_SIZES} {_SIZES_OF.get(name, '')} {_NOT_COMPUTED}".split())
    return name, tuple([a.name not in ignored for a in op._schema.arguments]), ignored


def _plain(value: Any) -> Any:
    """An argument without its tensors."""
    if type(value) in _PLAIN or isinstance(value, _NUMBERS):
        return value
    return tuple([v for v in value if isinstance(v, _NUMBERS)]) if isinstance(value, _LISTS) else None


def _content(t: Tensor) -> tuple[tuple[int, ...], int]:
    return tuple(t.shape), zlib.crc32(t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def record_step(walk: Walk, op: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor], out: Any) -> None:
    """Add an operation that has run to the walk's list."""
    name, counts, ignored = _compared(op)
    if name in _NOTHING:
        return
    outs = (out,) if isinstance(out, Tensor) else tuple(walk.tensors(out))
    operands = tuple([read_note(t).labels for t in tensors])
    labelled = not all(x is None for x in operands)
    contents: tuple[tuple[tuple[int, ...], int], ...] = ()
    real, real_outs = [t for t in tensors if not t.is_meta], [o for o in outs if not o.is_meta]
    if real_outs and all(read_note(t).made for t in real):
        for o in real_outs:
            note_on(o).made = True
    if real and (len(real) < len(tensors) or len(real_outs) < len(outs)):
        contents = tuple([_content(t) for t in real if t.numel() <= _SMALL or not read_note(t).made])
    values = tuple([_plain(a) for a, counted in zip(args, counts) if counted])
    if kwargs:
        values += tuple([(n, _plain(v)) for n, v in kwargs.items() if n not in ignored])
    walk.steps.append(
        Step(
            op,
            walk.module,
            values,
            contents,
            tuple([o.shape for o in outs]),
            tuple([read_note(o).labels for o in outs]),
            tuple([t.shape for t in tensors]) if labelled else _read(name, tensors),
            operands,
            labelled,
            _norm_groups(op, args, kwargs) if "group_norm" in name else None,
            _written(args[0]) if op._schema.is_mutable and not labelled and isinstance(args[0], Tensor) else None,
        )
    )


def _written(t: Tensor) -> tuple[tuple[int, ...], int]:
    """The sizes of what an operation writes into, and the size of all that lies in the same memory."""
    return tuple(t.shape), t.untyped_storage().nbytes() // t.element_size()


def _norm_groups(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[int, int]:
    """A GroupNorm's groups and its channels: an instance norm has as many groups as there are."""
    at, name = _argument_of_groups(op)
    return int(args[at] if at < len(args) else kwargs[name]), args[0].shape[1]


@cache
def _argument_of_groups(op: Any) -> tuple[int, str]:
    names = [a.name for a in op._schema.arguments]
    name = "num_groups" if "num_groups" in names else "group"
    return names.index(name), name


def _read(name: str, tensors: Sequence[Tensor]) -> _Sizes:
    """The sizes of operands that an operation's result may depend on."""
    if name.startswith("new_"):
        return ()
    if name in _PICKS:
        return tuple([varying_shape(t) for t in tensors])
    return tuple([t.shape for t in (tensors[:1] if name == "type_as" else tensors)])


def first_difference(before: Sequence[Step], after: Sequence[Step]) -> tuple[Step, str] | None:
    """The first operation of a sliced model that computes something else than the unsliced model's, and what."""
    for a, b in zip(before, after):
        what = _differs(a, b)
        if what is not None:
            return (a if a.labelled else b), what
    if len(before) == len(after):
        return None
    longer = before if len(before) > len(after) else after
    return longer[min(len(before), len(after))], "an operation"


def _differs(a: Step, b: Step) -> str | None:
    if a.op is not b.op or a.module != b.module:
        return "an operation"
    if a.values != b.values:
        return "a number"
    if a.contents != b.contents and any(x[0] == y[0] and x != y for x, y in zip(a.contents, b.contents)):
        return "a number"
    if a.groups is not None and b.groups is not None and a.groups[0] != b.groups[0]:
        instance = a.groups[0] == a.groups[1] and b.groups[0] == b.groups[1]
        if not instance:
            return "a number of groups"
    if len(a.sizes) != len(b.sizes):
        return "a number of pieces"
    if not a.labelled:  # what is made of sizes that follow the width has to follow it as well
        if a.written != b.written and a.written is not None and b.written is not None:
            return "a size" if a.written[1] == b.written[1] else None
        return "a number" if a.sizes == b.sizes and a.read != b.read else None
    name = a.op.overloadpacket.__name__
    if name in _ANY_SIZE:
        return None
    if name != "expand" and a.sizes != b.sizes and _any_resized(a.sizes, a.labels, b.sizes, b.labels):
        return "a size"
    return "a size" if a.read != b.read and _any_resized(a.read, a.operands, b.read, b.operands) else None


def _any_resized(a: _Sizes, mine: Sequence[Labels | None], b: _Sizes, theirs: Sequence[Labels | None]) -> bool:
    return any(_resized(*x) for x in zip(a, mine, b, theirs))


def _resized(a: Sequence[int], mine: Labels | None, b: Sequence[int], theirs: Labels | None) -> bool:
    """Whether an output has another size along a dim that has no labelled channels."""
    if a == b or mine is None:
        return False
    if len(a) != len(b):
        return True
    for dim, (before, after) in enumerate(zip(a, b)):
        if before != after and (not _labelled(mine, dim) or (after > 1 and not _labelled(theirs, dim))):
            return True
    return False


def _labelled(labels: Labels | None, dim: int) -> bool:
    return labels is not None and not all(x.shape[dim] == 1 for x in labels.maps)
