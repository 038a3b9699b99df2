"""From a plan to the index tables that the score kernel walks."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ..objective.shards import Shard
from ..ops.channel_scores import ScoreEntry, ScoreTable
from ..plan.plan import Member, Plan

# Subsets kept: several times the buckets of a backward of SDXL's UNet (some 160).
REMEMBERED = 512


@dataclass
class UnitTable:
    """The parameters that carry units, with their entries of one :class:`~diffprune_fast.ops.ScoreTable`.

    names: the parameter of every entry; one with more than two prunable dims has several. Buffers carry no score.
    """

    names: tuple[str, ...]
    table: ScoreTable
    _of: dict[str, list[int]] = field(default_factory=dict, repr=False)
    _subsets: OrderedDict[tuple[int, ...], tuple[tuple[str, ...], ScoreTable]] = field(
        default_factory=OrderedDict, repr=False
    )

    def __post_init__(self) -> None:
        for i, name in enumerate(self.names):
            self._of.setdefault(name, []).append(i)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Every scored parameter once, in the plan's order."""
        return tuple(self._of)

    @property
    def n_units(self) -> int:
        return self.table.n_units

    def subset(self, parameters: Iterable[str]) -> tuple[tuple[str, ...], ScoreTable]:
        """The entries of some parameters, in whatever order those come: the names of the entries, and their table.

        The last ones are kept, as every table holds memory on its device.
        """
        key = tuple(sorted(i for name in parameters for i in self._of.get(name, ())))
        if key not in self._subsets:
            self._subsets[key] = (tuple(self.names[i] for i in key), self.table.subset(key))
            while len(self._subsets) > REMEMBERED:
                self._subsets.popitem(last=False)
        self._subsets.move_to_end(key)
        return self._subsets[key]


def unit_table(
    plan: Plan, *, members: Mapping[str, Sequence[Member]] | None = None, parts: Mapping[str, Shard] | None = None
) -> UnitTable:
    """The tables of all parameters that ``plan`` can prune.

    members: group name to the members that count; None: all of them. parts: what there is of each parameter; None: all.
    Raises ValueError where two members claim the same channel, or a channel that the parameter doesn't have.
    """
    labels: dict[str, dict[int, np.ndarray]] = {}
    for g, group in enumerate(plan.groups):
        for member in group.members if members is None else members.get(group.name, ()):
            if member.parameter in plan.buffers or math.prod(plan.shapes[member.parameter]) == 0:
                continue
            dims = labels.setdefault(member.parameter, {})
            size = plan.shapes[member.parameter][member.dim]
            units = dims.setdefault(member.dim, np.full(size, -1, np.int32))
            _claim(units, member, int(plan.offsets[g]))
    names: list[str] = []
    entries: list[ScoreEntry] = []
    for name in (n for n in plan.shapes if n in labels):
        for entry in _entries(plan.shapes[name], labels[name], None if parts is None else parts[name]):
            names.append(name)
            entries.append(entry)
    return UnitTable(tuple(names), ScoreTable(entries, plan.n_units))


def _entries(shape: Sequence[int], labels: dict[int, np.ndarray], part: Shard | None) -> list[ScoreEntry]:
    """Those of a parameter, or of the part of it that there is."""
    if part is None:
        return collapse(shape, labels)
    if part.length == 0:
        return []
    if part.dim in labels:
        labels[part.dim] = labels[part.dim][part.start : part.start + part.length]
    return collapse([part.length if dim == part.dim else n for dim, n in enumerate(shape)], labels)


def _claim(units: np.ndarray, member: Member, offset: int) -> None:
    index = np.asarray(member.index)
    if index.size and not 0 <= index.min() <= index.max() < len(units):
        raise ValueError(f"{member.place} has {len(units)} channels, the plan names channel {index.max()}")
    if (units[index] >= 0).any() or np.bincount(index.ravel(), minlength=1).max() > 1:
        raise ValueError(f"the plan lists a channel of {member.place} twice")
    units[index] = offset + np.arange(len(index), dtype=np.int32)[:, None]


def collapse(shape: Sequence[int], labels: Mapping[int, np.ndarray]) -> list[ScoreEntry]:
    """A tensor with labelled dims as ``(outer, inner, trailing)`` entries, at most two labelled dims in each.

    labels: dim to ``(size,)`` int32 units, -1 where a channel has none. A first dim that is the only labelled one
    keeps the second dim apart, so that channels_last weights keep their ``(out, in, kernel)`` form.
    """
    dims = sorted(labels)
    entries = []
    for pair in (dims[i : i + 2] for i in range(0, len(dims), 2)):
        if len(pair) == 1 and pair[0] > 0:
            entries.append(_entry(shape, 0, pair[0], None, labels[pair[0]]))
        elif len(pair) == 1:
            entries.append(_entry(shape, 1, 1, labels[0], None))
        else:
            first, second = pair
            entries.append(_entry(shape, first + 1, second, labels[first], labels[second]))
    return entries


def _entry(
    shape: Sequence[int], split: int, second: int, rows: np.ndarray | None, columns: np.ndarray | None
) -> ScoreEntry:
    """Outer is ``shape[:split]`` (labelled by its last dim), inner ``shape[split:second + 1]`` (labelled by its last);
    with ``split == 0`` everything before ``second`` is outer."""
    if split == 0:
        split = second
    outer, inner = math.prod(shape[:split]), math.prod(shape[split : second + 1])
    return ScoreEntry(
        shape=(outer, inner, math.prod(shape[second + 1 :])),
        row_units=None if rows is None else _spread(rows, outer),
        col_units=None if columns is None else _spread(columns, inner),
    )


def _spread(units: np.ndarray, size: int) -> Tensor:
    """The last dim's units, repeated over the dims that were merged in front of it."""
    return torch.from_numpy(np.tile(units, size // len(units)).astype(np.int32))


def is_norm(module: nn.Module) -> bool:
    """True for normalisation layers, by class name: GroupNorm, LayerNorm, BatchNorm, RMSNorm and their kin."""
    return "norm" in type(module).__name__.lower()
