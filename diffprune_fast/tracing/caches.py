"""What forwards keep outside of the model: a walk leaves none of its tensors there.

A table that is made once and kept in a module's dictionary, in a class, a closure or under ``functools.lru_cache``
would be found there by the next real call, without data. Attributes of the model are put back by ``on_meta``; this is
the rest.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from ..module_tree import modules_of

# Nothing of theirs depends on a forward, and they are large.
_NOT_THEIRS = ("torch", "builtins", "numpy", "typing", "collections", "abc", "functools", __name__.partition(".")[0])


# Most of what else modules and classes hold: nothing can be left there.
_SIMPLE = frozenset((str, int, float, bool, bytes, type(None), type, ModuleType, property))


@contextmanager
def nothing_left_outside(model: nn.Module) -> Iterator[None]:
    """Take the walk's tensors out of dictionaries, lists and caches that the model's code can reach."""
    owners, held, memoised = _reachable(model)
    names = [(owner, dict(vars(owner))) for owner in owners]
    before = [(x, x.copy()) for x in held]
    try:
        yield
    finally:
        for owner, then in names:
            _put_back(owner, then)
        for now, then in before:
            if _changed(now, then) and _holds(now, 3):
                now.clear()
                (now.extend if isinstance(now, list) else now.update)(then)
        for f in memoised:
            if _holds(f, 5):
                f.cache_clear()


@contextmanager
def collector_paused() -> Iterator[None]:
    """Python's cycle collector waits: a walk makes so many objects that it would look through all of torch's modules,
    for 0.2 s, and find nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _put_back(owner: Any, then: dict[str, Any]) -> None:
    """The names of a module or class, if any of them is a tensor of the walk now."""
    changed = [k for k, v in vars(owner).items() if k not in then or then[k] is not v]
    if any(_holds(vars(owner)[k], 0) for k in changed):
        for k in changed:
            setattr(owner, k, then[k]) if k in then else delattr(owner, k)


def _reachable(model: nn.Module) -> tuple[list[Any], list[Any], list[Any]]:
    """What the code of the model's classes can write to: modules and classes, containers, memoised functions."""
    classes = {c: None for m in modules_of(model).values() for c in type(m).__mro__ if not _foreign(c.__module__)}
    modules = {n: sys.modules[n] for c in classes if (n := c.__module__) in sys.modules}
    for module in list(modules.values()):
        for f in list(vars(module).values()):
            n = f.__module__ or "" if type(f) is FunctionType else ""
            if n in sys.modules and not _foreign(n):
                modules.setdefault(n, sys.modules[n])
    held: dict[int, Any] = {}
    memoised: dict[int, Any] = {}
    values = [v for m in modules.values() for k, v in list(vars(m).items()) if not k.startswith("__")]
    for value in [*values, *[v for c in classes for v in list(vars(c).values())]]:
        for x in _parts(value) if type(value) not in _SIMPLE else ():
            if type(x) in (dict, list, set):
                held[id(x)] = x
            elif hasattr(type(x), "cache_clear"):
                memoised[id(x)] = x
    return [*modules.values(), *classes], list(held.values()), list(memoised.values())


def _foreign(module: str) -> bool:
    return module.partition(".")[0] in _NOT_THEIRS


def _parts(value: Any) -> Iterator[Any]:
    """A value, and what a function holds: its closure, its defaults, its attributes."""
    yield value
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
        yield value
    if type(value) is FunctionType:
        yield vars(value)
        yield from value.__defaults__ or ()
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not bound yet
                continue


def _changed(now: Any, then: Any) -> bool:
    if len(now) != len(then):
        return True
    if isinstance(now, dict):
        return any(k not in then or then[k] is not v or isinstance(v, (dict, list)) for k, v in now.items())
    return isinstance(now, set) or any(a is not b or isinstance(a, (dict, list)) for a, b in zip(now, then))


def _holds(x: Any, depth: int) -> bool:
    """Whether a tensor of a walk lies in there: all that a walk makes is of inference mode."""
    if isinstance(x, Tensor):
        return x.is_inference()
    if depth == 0 or isinstance(x, (str, int, float, type, FunctionType, nn.Module)) or x is None:
        return False
    if isinstance(x, dict):
        return any(_holds(v, depth - 1) for v in x.values())
    if isinstance(x, (list, tuple, set)):
        return any(_holds(v, depth - 1) for v in x)
    return any(_holds(v, depth - 1) for v in gc.get_referents(x)) if "lru" in type(x).__name__ else False
