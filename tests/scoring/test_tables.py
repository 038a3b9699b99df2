"""From a plan to the kernel's index tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scoring_models import by_hand

from diffprune_fast.ops.channel_scores import ScoreEntry, ScoreTable, channel_scores_
from diffprune_fast.plan import Group, Member, Plan
from diffprune_fast.scoring import tables
from diffprune_fast.scoring.tables import unit_table


def plan_of(shapes: dict[str, tuple[int, ...]], *groups: Group, buffers: frozenset[str] = frozenset()) -> Plan:
    return Plan("Hand", groups, (), {}, shapes, buffers=buffers)


def members(*places: tuple[str, int], index: np.ndarray) -> tuple[Member, ...]:
    return tuple(Member(p, d, index) for p, d in places)


def column(*channels: int) -> np.ndarray:
    return np.array(channels).reshape(-1, 1)


def table_scores(plan: Plan, values: dict[str, torch.Tensor]) -> np.ndarray:
    table = unit_table(plan)
    scores = torch.zeros(plan.n_units, dtype=torch.float64)
    thetas = [values[n].abs().sqrt() for n in table.names]
    channel_scores_(scores, thetas, None, table.table, criterion="magnitude")
    return scores.numpy()


SHAPES = {
    "vector": (6,),
    "linear": (6, 5),
    "conv": (6, 5, 3, 3),
    "embedding": (1, 4, 6),
    "volume": (6, 2, 5),
    "four": (3, 6, 2, 5),
}
PLACES = {
    "rows of a vector": [("vector", 0)],
    "rows of a matrix": [("linear", 0)],
    "columns of a matrix": [("linear", 1)],
    "rows and columns of a kernel": [("conv", 0), ("conv", 1)],
    "last dim of an embedding": [("embedding", 2)],
    "outer dims with one between": [("volume", 0), ("volume", 2)],
    "inner dims of four": [("four", 1), ("four", 3)],
    "three dims of four": [("four", 0), ("four", 1), ("four", 3)],
}


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES.keys())
def test_every_element_counts_once_for_each_labelled_dim(places: list[tuple[str, int]]) -> None:
    groups = []
    for parameter, dim in places:
        n = SHAPES[parameter][dim]
        order = np.random.default_rng(dim).permutation(n)
        groups.append(Group(f"{parameter}:{dim}", n, (Member(parameter, dim, order.reshape(n, 1)),)))
    plan = plan_of(SHAPES, *groups)
    values = {n: torch.rand(s, dtype=torch.float64) for n, s in SHAPES.items()}
    np.testing.assert_allclose(table_scores(plan, values), by_hand(plan, values), rtol=1e-12)


def test_a_unit_with_two_channels_in_a_place_gets_both() -> None:
    group = Group("g", 3, members(("linear", 0), index=np.array([[0, 3], [1, 4], [2, 5]])))
    plan = plan_of(SHAPES, group)
    values = {n: torch.rand(s, dtype=torch.float64) for n, s in SHAPES.items()}
    rows = values["linear"].sum(1)
    np.testing.assert_allclose(table_scores(plan, values), (rows[:3] + rows[3:]).numpy(), rtol=1e-12)


def test_two_groups_share_a_dim_and_a_frozen_channel_counts_for_none() -> None:
    first = Group("a", 2, members(("linear", 0), index=column(4, 1)))
    second = Group("b", 3, members(("linear", 0), index=column(0, 2, 5)))
    plan = plan_of(SHAPES, first, second)
    values = {n: torch.rand(s, dtype=torch.float64) for n, s in SHAPES.items()}
    rows = values["linear"].sum(1).numpy()
    np.testing.assert_allclose(table_scores(plan, values), rows[[4, 1, 0, 2, 5]], rtol=1e-12)


def test_channels_last_weights_score_like_contiguous_ones() -> None:
    plan = plan_of(SHAPES, Group("g", 6, members(("conv", 0), index=column(*range(6)))))
    values = {n: torch.rand(s, dtype=torch.float64) for n, s in SHAPES.items()}
    last = {**values, "conv": values["conv"].contiguous(memory_format=torch.channels_last)}
    np.testing.assert_allclose(table_scores(plan, last), table_scores(plan, values), rtol=1e-12)


def test_buffers_carry_no_score() -> None:
    group = Group("g", 6, members(("vector", 0), ("linear", 0), index=column(*range(6))))
    table = unit_table(plan_of(SHAPES, group, buffers=frozenset({"vector"})))
    assert table.parameters == ("linear",)


def test_a_channel_in_two_units_is_refused() -> None:
    first = Group("a", 2, members(("linear", 0), index=column(0, 1)))
    second = Group("b", 2, members(("linear", 0), index=column(1, 2)))
    with pytest.raises(ValueError, match=r"channel of linear:0 twice"):
        unit_table(plan_of(SHAPES, first, second))


def test_a_channel_that_the_parameter_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"linear:1 has 5 channels, the plan names channel 5"):
        unit_table(plan_of(SHAPES, Group("g", 2, members(("linear", 1), index=column(0, 5)))))


def test_a_subset_has_all_entries_of_its_parameters_and_is_kept() -> None:
    groups = [
        Group(f"four:{d}", SHAPES["four"][d], members(("four", d), index=column(*range(n))))
        for d, n in ((0, 3), (1, 6), (3, 5))
    ]
    table = unit_table(plan_of(SHAPES, *groups, Group("v", 6, members(("vector", 0), index=column(*range(6))))))
    names, entries = table.subset(["four"])
    assert names == ("four", "four")
    assert len(entries) == 2
    assert table.subset(["four"])[1] is entries


def test_subsets_know_no_order_and_only_the_last_ones_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "REMEMBERED", 2)
    names = ("a", "b", "c")
    table = tables.UnitTable(names, ScoreTable([ScoreEntry((2, 1, 1))] * 3, 0))
    first = table.subset(["b", "a"])
    assert first[0] == ("a", "b")
    assert table.subset(["a", "b"])[1] is first[1]
    table.subset(["c"])
    table.subset(["a"])
    assert table.subset(["a", "b"])[1] is not first[1]
