"""Tables of positions that a module computes anew for inputs of another size: a pruned one keeps some of the columns.

The pruned module gets its table from hooks: that of the full width, of which the kept columns stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.position_tables import Size, table_of
from ..module_tree import modules_of


class KeptColumns:
    """Hooks of a pruned module. kept: ``(n_kept,)``, the columns of a table of ``width`` that stay."""

    def __init__(self, kept: Tensor, width: int) -> None:
        self.kept, self.width = kept, width
        self._before: list[tuple[Size, Tensor]] = []

    def attach(self, module: nn.Module) -> None:
        detach(module)
        module.register_forward_pre_hook(self.enlarge)
        module.register_forward_hook(self.restore, always_call=True)

    def enlarge(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Give the module the table for these inputs, so that it makes none."""
        rule = table_of(module)
        assert rule is not None
        held: Tensor = getattr(module, rule.buffer)
        self._before.append((rule.held(module), held))
        size = rule.wanted(module, inputs)
        if size != rule.held(module):
            table = rule.made(module, size, self.width, held.device)
            rule.hold(module, size, table.index_select(-1, self.kept.to(held.device)).to(held.dtype))

    def restore(self, module: nn.Module, inputs: Any, output: Any) -> None:
        rule = table_of(module)
        if rule is not None and self._before:
            rule.hold(module, *self._before.pop())


def detach(module: nn.Module) -> None:
    """Take such hooks off a module: the table that it holds is one that its class makes."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), KeptColumns)]:
            del hooks[key]


def kept_columns(model: nn.Module) -> dict[str, KeptColumns]:
    """The modules of a pruned model that have such hooks, by name."""
    found = {}
    for name, module in modules_of(model).items():
        for hook in module._forward_pre_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, KeptColumns):
                found[name] = owner
    return found


def columns_to_keep(
    model: nn.Module, kept: Mapping[tuple[str, int], Any], widths: Mapping[str, tuple[int, ...]]
) -> list[tuple[nn.Module, KeptColumns]]:
    """The modules from whose tables slicing takes columns, and the hooks that :meth:`KeptColumns.attach` gives them.

    kept: of (buffer, dim), the columns that stay; widths: the buffers' shapes before.
    """
    known, found = kept_columns(model), []
    for name, module in modules_of(model).items():
        rule = table_of(module)
        path = f"{name}.{rule.buffer}".lstrip(".") if rule is not None else ""
        if rule is not None and (path, 2) in kept:
            columns, width = torch.as_tensor(kept[path, 2]), widths[path][2]
            if name in known:  # pruned before
                columns, width = known[name].kept[columns], known[name].width
            found.append((module, KeptColumns(columns, width)))
    return found
