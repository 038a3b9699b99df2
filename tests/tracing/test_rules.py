"""How rules are registered and called."""

from __future__ import annotations

import inspect

import pytest
import torch

from diffprune_fast.tracing.rules.registry import RULES, rule

OPERATIONS = sorted({r.function for r in RULES.values()}, key=lambda f: f.__name__)


def test_an_operation_has_one_rule() -> None:
    with pytest.raises(ValueError, match="aten::linear has a rule already, linear"):
        rule("linear")(lambda op, x: op.run())
    assert RULES["aten::linear"].function.__name__ == "linear"


@pytest.mark.parametrize("function", OPERATIONS, ids=lambda f: f.__name__)
def test_a_rule_asks_for_arguments_that_its_operations_have(function: object) -> None:
    mine = {name.removeprefix("aten::"): r for name, r in RULES.items() if r.function is function}
    given = 4 if next(iter(mine.values())).of_first else 2
    asked = list(inspect.signature(function).parameters)[given:]  # type: ignore[arg-type]
    has = set()
    for name in mine:
        packet = getattr(torch.ops.aten, name, None)
        for overload in packet.overloads() if packet is not None else ():
            has |= {a.name for a in getattr(packet, overload)._schema.arguments[1:]}
    assert set(asked) <= has
