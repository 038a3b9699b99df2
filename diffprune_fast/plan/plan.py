"""The plan: which channels of a model go together, as integer tables.

A plan depends on a model's structure only, never on its weights' values. Everything that comes after tracing
(scoring, selecting, slicing) walks these tables; nothing in them is an object per channel.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from .fixes import NormFix, ScaleFix

FORMAT = 1


Keep = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Member:
    """One place that a group's units touch: dimension ``dim`` of ``parameter`` (or of a buffer), by its first name.

    index: ``(n_units, multiplicity)`` int64; row ``u`` lists the channels of this place that belong to unit ``u``.
    """

    parameter: str
    dim: int
    index: np.ndarray

    @property
    def place(self) -> str:
        return f"{self.parameter}:{self.dim}"


@dataclass(frozen=True)
class Group:
    """All units that touch the same places, with the same multiplicity in each of them.

    name: the module whose output channels they are, where there is one, and unique in a plan. n_units: how many there
    are. members: the places.
    """

    name: str
    n_units: int
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Constraint:
    """A matrix of units whose rows must keep equally many.

    kind: ``"norm"`` (rows are a GroupNorm's groups), ``"heads"`` (the dims of each head), ``"chunk"`` (the pieces of a
    split), ``"conv_groups"`` (a convolution's groups), ``"view"`` (a width that a reshape makes of channels),
    ``"size"`` (two whole widths, one of which the forward takes from the other); ``"instance_norm"`` (one channel in
    each row, a norm whose number of groups follows its channels) always holds. place: the operation, for messages.
    rows: ``(n_rows, per_row)`` int64 of plan-wide unit ids (see :attr:`Plan.offsets`); -1 is a channel that
    always stays. A unit may stand in a row more than once.
    """

    kind: str
    place: str
    rows: np.ndarray


@dataclass(frozen=True)
class Attribute:
    """An attribute ``name`` of a module, by its path, that follows a number of channels, or a power of it.

    extent: the entry of ``Plan.extents`` that it follows. power: 1 for a number of channels; -0.5 for a softmax scale
    that a forward leaves to its default.
    """

    module: str
    name: str
    extent: int
    power: float = 1.0


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates of one operation: ``scale`` times the product of its extents.

    place: the operation. scale: what of it doesn't follow any width. extents: entries of ``Plan.extents``. attention:
    a product of two activations (there are no weights in it).
    """

    place: str
    scale: int
    extents: tuple[int, ...]
    attention: bool = False


@dataclass(frozen=True)
class Extents:
    """Numbers of channels as affine functions of the kept counts: ``base + per_group @ counts``.

    base: ``(n_extents,)``; per_group: ``(n_extents, n_groups)``.
    """

    base: np.ndarray
    per_group: np.ndarray

    def at(self, counts: np.ndarray) -> np.ndarray:
        return self.base + self.per_group @ counts


@dataclass(frozen=True)
class Complexity:
    """params: number of parameters. macs: multiply-accumulates of one forward of one sample."""

    params: int
    macs: int

    def __str__(self) -> str:
        return f"{self.params / 1e6:.2f}M parameters, {self.macs / 1e9:.4g} GMACs"


@dataclass(frozen=True)
class Plan:
    """Groups, constraints and frozen places of one model. Immutable, printable, hashable.

    model_class: the model's class, by name. groups: what can be removed. constraints: which kept counts must agree.
    frozen: place (``"conv_in.weight:1"``) to the reason why its channels stay. shapes: every parameter and
    floating-point buffer, by its first name; buffers: which of them are buffers. scale_fixes: weights that take a
    factor when head dims go. attributes: what else in the modules follows a width. costs: the operations of one forward
    of the example inputs; extents: the widths that costs and attributes speak of. notes: what else reads channels.
    norm_fixes: weights by their norm (weight_norm), which take a factor when inputs go.
    """

    model_class: str
    groups: tuple[Group, ...]
    constraints: tuple[Constraint, ...]
    frozen: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    buffers: frozenset[str] = frozenset()
    scale_fixes: tuple[ScaleFix, ...] = ()
    attributes: tuple[Attribute, ...] = ()
    costs: tuple[Cost, ...] = ()
    extents: Extents = field(default_factory=lambda: Extents(np.zeros(0), np.zeros((0, 0))))
    notes: tuple[str, ...] = ()
    norm_fixes: tuple[NormFix, ...] = ()

    @cached_property
    def offsets(self) -> np.ndarray:
        """``(n_groups + 1,)``: group ``g`` owns the plan-wide unit ids ``offsets[g]:offsets[g + 1]``."""
        return np.concatenate([[0], np.cumsum([g.n_units for g in self.groups], dtype=np.int64)]).astype(np.int64)

    @property
    def n_units(self) -> int:
        return int(self.offsets[-1])

    @cached_property
    def group_of(self) -> np.ndarray:
        """``(n_units,)``: the place in ``groups`` of every plan-wide unit's group."""
        return np.repeat(np.arange(len(self.groups)), np.diff(self.offsets))

    def keep_of(self, stays: np.ndarray) -> dict[str, np.ndarray]:
        """The keep-set that a mask over all units, ``(n_units,)`` bool, says."""
        return {g.name: np.flatnonzero(part) for g, part in zip(self.groups, np.split(stays, self.offsets[1:-1]))}

    def masks(self, keep: Keep) -> dict[str, np.ndarray]:
        """Of every tensor that loses channels: ``(its shape)`` bool, False where ``keep`` leaves nothing."""
        found: dict[str, np.ndarray] = {}
        for group in self.groups:
            gone = np.setdiff1d(np.arange(group.n_units), keep.get(group.name, np.arange(group.n_units)))
            for m in group.members if gone.size else ():
                mask = found.setdefault(m.parameter, np.ones(self.shapes[m.parameter], bool))
                np.moveaxis(mask, m.dim, 0)[m.index[gone].reshape(-1)] = False
        return found

    @cached_property
    def position(self) -> dict[str, int]:
        """Group name to its place in ``groups``."""
        return {g.name: i for i, g in enumerate(self.groups)}

    def __getitem__(self, name: str) -> Group:
        return self.groups[self.position[name]]

    def counts(self, keep: Keep | np.ndarray | None = None) -> np.ndarray:
        """Kept units per group, ``(n_groups,)`` int64. A group that ``keep`` doesn't name is kept whole."""
        if isinstance(keep, np.ndarray):
            return keep.astype(np.int64)
        full = np.diff(self.offsets)
        if keep is not None:
            full = full.copy()
            for name, units in keep.items():
                full[self.position[name]] = len(units)
        return full

    @cached_property
    def _parameter_extents(self) -> tuple[np.ndarray, Extents, np.ndarray]:
        """Per parameter: unlabelled size, and two extents (its two prunable dims; a dummy 1 where there is none)."""
        names = [n for n in self.shapes if n not in self.buffers]
        row = {n: i for i, n in enumerate(names)}
        dims: dict[tuple[str, int], np.ndarray] = {}
        for g, group in enumerate(self.groups):
            for m in group.members:
                if m.parameter in row:
                    dims.setdefault((m.parameter, m.dim), np.zeros(len(self.groups), np.int64))[g] += m.index.shape[1]
        rest = np.array([int(np.prod(self.shapes[n], dtype=np.int64)) for n in names], np.int64)
        owner = np.zeros(len(dims), np.int64)
        base = np.zeros(len(dims), np.int64)
        full = np.diff(self.offsets)
        per_group = np.zeros((len(dims), len(self.groups)), np.int64)
        for i, ((name, dim), weights) in enumerate(dims.items()):
            owner[i] = row[name]
            rest[row[name]] //= max(self.shapes[name][dim], 1)
            base[i] = self.shapes[name][dim] - weights @ full
            per_group[i] = weights
        return rest, Extents(base, per_group), owner

    def params(self, keep: Keep | np.ndarray | None = None) -> int:
        """Parameters that are left with ``keep`` (group name to kept units, or kept counts per group)."""
        rest, extents, owner = self._parameter_extents
        total = rest.copy()
        np.multiply.at(total, owner, extents.at(self.counts(keep)))
        return int(total.sum())

    @cached_property
    def _cost_table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        width = max((len(c.extents) for c in self.costs), default=1)
        index = np.full((len(self.costs), width), len(self.extents.base), np.int64)
        for i, cost in enumerate(self.costs):
            index[i, : len(cost.extents)] = cost.extents
        scale = np.array([c.scale for c in self.costs], np.float64)
        return scale, index, np.array([not c.attention for c in self.costs], bool)

    def macs(self, keep: Keep | np.ndarray | None = None, *, attention: bool = False) -> int:
        """Multiply-accumulates of one forward of the example inputs with ``keep``, by arithmetic.

        Convolutions and linear layers are counted, as in the paper's tables; ``attention=True`` adds the products of
        queries, keys and values.
        """
        scale, index, weighted = self._cost_table
        sizes = np.append(self.extents.at(self.counts(keep)), 1)
        macs = scale * sizes[index].prod(axis=1)
        return round(float(macs.sum() if attention else macs[weighted].sum()))

    def complexity(self, keep: Keep | np.ndarray | None = None) -> Complexity:
        """:meth:`params` and :meth:`macs` of what ``keep`` leaves."""
        return Complexity(self.params(keep), self.macs(keep))

    def to_json(self) -> str:
        """The plan as JSON text; :meth:`from_json` gives an equal plan."""
        return json.dumps(_encode(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        data = json.loads(text)
        if data.get("format") != FORMAT:
            raise ValueError(f"plan format {data.get('format')!r} is not {FORMAT}: trace the model again")
        return _decode(data)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the JSON text: equal for equal plans, on any machine."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.hash == other.hash

    def __hash__(self) -> int:
        return int(self.hash[:16], 16)

    def __str__(self) -> str:
        lines = [f"Plan of {self.model_class}: {len(self.groups)} groups, {self.n_units} units, {self.complexity()}"]
        of = _constraints_by_group(self)
        for i, group in enumerate(self.groups):
            notes = f"  [{', '.join(of[i])}]" if of.get(i) else ""
            lines.append(f"  {group.name}: {group.n_units} units in {len(group.members)} places{notes}")
        reasons: dict[str, int] = {}
        for reason in self.frozen.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        lines.append(f"  frozen: {len(self.frozen)} places")
        lines += [f"    {n} x {reason}" for reason, n in sorted(reasons.items(), key=lambda kv: (-kv[1], kv[0]))]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    __repr__ = __str__


def _constraints_by_group(plan: Plan) -> dict[int, list[str]]:
    notes: dict[int, list[str]] = {}
    for c in plan.constraints:
        for g in np.unique(plan.group_of[c.rows[c.rows >= 0]]).tolist():
            note = f"{c.kind} {c.rows.shape[0]}x{c.rows.shape[1]}"
            if note not in notes.setdefault(g, []):
                notes[g].append(note)
    return notes


def _pack(a: np.ndarray) -> dict[str, Any]:
    """An integer array as JSON: arithmetic progressions by start and step, everything else in full."""
    flat = a.reshape(-1)
    step = int(flat[1] - flat[0]) if flat.size > 1 else 1
    if flat.size and np.array_equal(flat, flat[0] + step * np.arange(flat.size)):
        return {"shape": list(a.shape), "start": int(flat[0]), "step": step}
    return {"shape": list(a.shape), "values": flat.tolist()}


def _unpack(d: Mapping[str, Any]) -> np.ndarray:
    shape = tuple(d["shape"])
    if "values" in d:
        return np.array(d["values"], np.int64).reshape(shape)
    return (d["start"] + d["step"] * np.arange(int(np.prod(shape)), dtype=np.int64)).reshape(shape)


def _encode(plan: Plan) -> dict[str, Any]:
    rows, cols = np.nonzero(plan.extents.per_group)
    return {
        "format": FORMAT,
        "model_class": plan.model_class,
        "groups": [
            {
                "name": g.name,
                "n_units": g.n_units,
                "members": [{"parameter": m.parameter, "dim": m.dim, "index": _pack(m.index)} for m in g.members],
            }
            for g in plan.groups
        ],
        "constraints": [{"kind": c.kind, "place": c.place, "rows": _pack(c.rows)} for c in plan.constraints],
        "frozen": dict(plan.frozen),
        "shapes": {n: list(s) for n, s in plan.shapes.items()},
        "order": list(plan.shapes),
        "buffers": sorted(plan.buffers),
        "scale_fixes": [
            {
                "place": f.place,
                "n_dims": f.n_dims,
                "units": _pack(f.units),
                "targets": [[n, _pack(r)] for n, r in f.targets],
            }
            for f in plan.scale_fixes
        ],
        "attributes": [[a.module, a.name, a.extent, a.power] for a in plan.attributes],
        "costs": [[c.place, c.scale, list(c.extents), c.attention] for c in plan.costs],
        "extents": {
            "base": plan.extents.base.tolist(),
            "n_groups": len(plan.groups),
            "entries": [rows.tolist(), cols.tolist(), plan.extents.per_group[rows, cols].tolist()],
        },
        **({"notes": list(plan.notes)} if plan.notes else {}),
        **({"norm_fixes": [[f.gain, f.direction] for f in plan.norm_fixes]} if plan.norm_fixes else {}),
    }


def _decode(d: Mapping[str, Any]) -> Plan:
    base = np.array(d["extents"]["base"])
    r, c, v = d["extents"]["entries"]
    per_group = np.zeros((len(base), d["extents"]["n_groups"]), np.array(v or [0]).dtype)
    per_group[r, c] = v
    return Plan(
        model_class=d["model_class"],
        groups=tuple(
            Group(
                g["name"],
                g["n_units"],
                tuple(Member(m["parameter"], m["dim"], _unpack(m["index"])) for m in g["members"]),
            )
            for g in d["groups"]
        ),
        constraints=tuple(Constraint(c["kind"], c["place"], _unpack(c["rows"])) for c in d["constraints"]),
        frozen=d["frozen"],
        shapes={n: tuple(d["shapes"][n]) for n in d["order"]},
        buffers=frozenset(d["buffers"]),
        scale_fixes=tuple(
            ScaleFix(f["place"], f["n_dims"], _unpack(f["units"]), tuple((n, _unpack(r)) for n, r in f["targets"]))
            for f in d["scale_fixes"]
        ),
        attributes=tuple(Attribute(*a) for a in d["attributes"]),
        costs=tuple(Cost(p, s, tuple(e), a) for p, s, e, a in d["costs"]),
        extents=Extents(base, per_group),
        notes=tuple(d.get("notes", ())),
        norm_fixes=tuple(NormFix(*f) for f in d.get("norm_fixes", ())),
    )


UNUSED = "the forward doesn't use it as channels"


def unreached(plan: Plan) -> list[str]:
    """Parameters of more than one element that the traced calls didn't use: they keep all their channels."""
    reasons: dict[str, set[str]] = {}
    for place, reason in plan.frozen.items():
        reasons.setdefault(place.rpartition(":")[0], set()).add(reason)
    sliced = {m.parameter for g in plan.groups for m in g.members} | plan.buffers
    return [n for n, s in plan.shapes.items() if reasons.get(n) == {UNUSED} and n not in sliced and max(s) > 1]
