"""Faults at every line: what a model, its optimiser and its record look like, and a trace function that raises."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import diffprune_fast
from diffprune_fast.pruned.record import record_of

PACKAGE = Path(diffprune_fast.__file__).parent
# Where a pruning changes things, or makes ready what changes them.
FILES = tuple(
    str(PACKAGE / name)
    for name in (
        "slicing/prune.py",
        "slicing/execute.py",
        "slicing/commit.py",
        "slicing/optimizers.py",
        "slicing/reducers.py",
        "ops/slice_channels.py",
        "ops/cpu.py",
        "ops/reference.py",
        "pruned/kept_columns.py",
        "pruned/record.py",
        "depth/drop_blocks.py",
        "depth/shallower.py",
        "checkpoint/saving.py",
        "result.py",
        "method.py",
        "stages.py",
    )
)


def photograph(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Everything of a model that a pruning could change, copied."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        seen[f"{name} modules"] = {k: id(m) for k, m in module._modules.items()}
        seen[f"{name} hooks"] = len(module._forward_hooks), len(module._forward_pre_hooks)
        seen[f"{name} plain"] = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str, tuple))}
        for key, t in [*module._parameters.items(), *module._buffers.items()]:
            if t is not None:
                seen[f"{name}.{key}"] = t.detach().clone()
                seen[f"{name}.{key} is"] = id(t)
                seen[f"{name}.{key} grad"] = None if t.grad is None else t.grad.clone()
                state = {} if optimizer is None else optimizer.state.get(t, {})
                seen[f"{name}.{key} state"] = {k: torch.as_tensor(v).clone() for k, v in state.items()}
    record = record_of(model)
    seen["record"] = {"shapes": dict(record.shapes), "keep": record.about.get("keep"), "plan": record.about.get("plan")}
    if optimizer is not None:
        seen["groups"] = [[id(p) for p in g["params"]] for g in optimizer.param_groups]
    return seen


def differences(a: Any, b: Any, *, identity: bool = True) -> list[str]:
    """Names of what isn't the same. identity: also that of parameters and modules."""

    def same(x: Any, y: Any) -> bool:
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            return x.shape == y.shape and x.stride() == y.stride() and torch.equal(x, y)
        if isinstance(x, dict) and isinstance(y, dict):
            return x.keys() == y.keys() and all(same(x[k], y[k]) for k in x)
        return bool(x == y)

    names = [n for n in a.keys() | b.keys() if identity or not n.endswith((" is", " modules", "groups"))]
    return sorted(n for n in names if n not in a or n not in b or not same(a[n], b[n]))


class Lines:
    """Counts the lines that run in FILES once ``begin`` is called, and raises at one of them.

    at: which line, counted from 0; -1 for none. begin: a module and the name of a function in it; only from its call on
    is anything traced, which spares the time of what comes before.
    """

    def __init__(self, at: int, begin: tuple[ModuleType, str], error: type[BaseException] = MemoryError) -> None:
        self.at, self.error, self.begin = at, error, begin
        self.count, self.where = 0, ""
        self.order: list[tuple[str, int]] = []

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line":
            now, self.count = self.count, self.count + 1
            self.order.append((frame.f_code.co_filename, frame.f_lineno))
            if now == self.at:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise self.error(f"injected at {self.where}")
        return self._trace

    def run(self, work: Callable[[], Any]) -> Any:
        module, name = self.begin
        original, former = getattr(module, name), sys.gettrace()

        def begun(*args: Any, **kwargs: Any) -> Any:
            frame: FrameType | None = sys._getframe(1)
            while frame is not None and frame.f_code.co_filename in FILES:
                frame.f_trace = self._trace
                frame = frame.f_back
            setattr(module, name, original)
            sys.settrace(self._trace)
            return original(*args, **kwargs)

        setattr(module, name, begun)
        try:
            return work()
        finally:
            sys.settrace(former)
            setattr(module, name, original)


def each_line(order: list[tuple[str, int]], files: tuple[str, ...] = ()) -> list[int]:
    """Of every line that ran (in ``files``), the last time, as positions; all where EVERY_LINE is set: minutes."""
    if files:
        last = {line: i for i, line in enumerate(order) if line[0].endswith(files)}
        return sorted(last.values())
    if os.environ.get("EVERY_LINE"):
        return list(range(len(order)))
    return sorted({line: i for i, line in enumerate(order)}.values())
