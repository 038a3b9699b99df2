"""Plans made by hand, with every kind of constraint, for the tests of selection."""

from __future__ import annotations

import numpy as np

from diffprune_fast.plan import Constraint, Cost, Extents, Group, Member, Plan


def chain(widths: list[int], constraints: list[Constraint], multiplicities: list[int] | None = None) -> Plan:
    """Linear layers in a row: group ``i`` is the output of ``layer{i}`` and the input of ``layer{i + 1}``."""
    times = multiplicities or [1] * len(widths)
    shapes = {}
    groups = []
    channels = [w * t for w, t in zip(widths, times, strict=True)]
    for i, (width, t) in enumerate(zip(widths, times, strict=True)):
        index = np.arange(width * t).reshape(width, t)
        groups.append(
            Group(
                f"layer{i}",
                width,
                (Member(f"layer{i}.weight", 0, index), Member(f"layer{i + 1}.weight", 1, index)),
            )
        )
        shapes[f"layer{i}.weight"] = (channels[i], channels[i - 1] if i else 3)
    shapes[f"layer{len(widths)}.weight"] = (5, channels[-1])
    n = len(widths)
    extents = Extents(np.array([0] * n + [3, 5]), np.vstack([np.diag(times), np.zeros((2, n))]).astype(np.int64))
    inputs = [n, *range(n)]
    outputs = [*range(n), n + 1]
    costs = tuple(Cost(f"layer{i}", 10, (a, b)) for i, (a, b) in enumerate(zip(inputs, outputs, strict=True)))
    return Plan("Chain", tuple(groups), tuple(constraints), {}, shapes, costs=costs, extents=extents)


def random_plan(seed: int) -> Plan:
    """A chain of 1-6 groups under random constraints, some of which straddle groups or hold channels that stay."""
    rng = np.random.default_rng(seed)
    widths = [int(w) for w in rng.choice([6, 7, 12, 16, 24, 32, 48, 64, 96], rng.integers(1, 7))]
    times = [int(t) for t in rng.choice([1, 1, 1, 2, 4], len(widths))]
    offsets = np.concatenate([[0], np.cumsum(widths)])
    constraints = []
    for i in range(int(rng.integers(0, 5))):
        some = rng.choice(len(widths), int(rng.integers(1, min(3, len(widths)) + 1)), replace=False)
        units = np.concatenate([np.arange(offsets[g], offsets[g + 1]) for g in some])
        if rng.random() < 0.3:
            units = np.repeat(units, 2)
        if rng.random() < 0.3:
            units = np.concatenate([units, np.full(int(rng.choice([4, 8, 32])), -1)])
        if rng.random() < 0.2:
            rng.shuffle(units)
        rows = [r for r in (1, 2, 3, 4, 6, 8, 12, 16) if len(units) % r == 0]
        kind = str(rng.choice(["norm", "norm", "heads", "chunk", "conv_groups"]))
        constraints.append(Constraint(kind, f"place{i}", units.reshape(int(rng.choice(rows)), -1)))
    if rng.random() < 0.2:  # rows of single units: whatever goes, a row goes as a whole
        constraints.append(Constraint("heads", "single", np.repeat(np.arange(widths[0]), 3).reshape(-1, 3)))
    return chain(widths, constraints, times)
