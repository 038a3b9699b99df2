"""What can be read of a model beside what its forward returns: latents, features in attributes, other methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from . import spelled_norms
from .computed_weights import is_computed_weight
from .notes import read_note
from .outputs import outputs_in
from .records import Calls
from .walk import Walk

# Their methods beside forward are for serving and saving, and are many.
_LIBRARIES = ("torch", "diffusers", "transformers", "huggingface_hub", "peft", "accelerate", "builtins")


def hand_out(walk: Walk, tree: Any, reason: str) -> None:
    """The channels of all tensors in there stay: somebody else reads them."""
    for t in outputs_in(tree):
        statistic = read_note(t).statistic
        if statistic is not None:
            spelled_norms.freeze_statistic(walk, statistic)
        for label_map in walk.maps(t):
            walk.graph.freeze(label_map, reason)


def latents_stay(model: nn.Module, walk: Walk) -> None:
    """What an autoencoder's forward hands from ``encode`` to ``decode`` is an interface: they are called apart as well.

    To be called inside ``on_meta``, which puts the methods back.
    """
    names = ("encode", "decode")
    if all(inspect.ismethod(getattr(model, name, None)) for name in names):
        for name in names:
            vars(model)[name] = _telling(getattr(model, name), walk, f"is handed over by {name}, which is called apart")


def _telling(method: Callable[..., Any], walk: Walk, reason: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        hand_out(walk, (args, kwargs), reason)
        out = method(*args, **kwargs)
        hand_out(walk, out, reason)
        return out

    return call


def note_attributes(walk: Walk) -> None:
    """Name the attributes in which a forward has left activations: their channels may go.

    To be called inside ``on_meta``, which takes them away.
    """
    for path, module in walk.by_name.items():
        held = [(n, v) for n, v in vars(module).items() if n not in _OF_TORCH and isinstance(v, _HOLDERS)]
        for name, value in (*held, *module._buffers.items()):
            left = any(walk.maps(t) and walk.name_of(t) is None for t in _tensors(value, 2))
            if left and not is_computed_weight(module, name):
                where = f"{path}.{name}".lstrip(".")
                walk.notes.append(
                    f"the forward leaves activations in {where}, which may lose channels: if they are read, name them "
                    "as an output or keep their groups (ignore=[...])"
                )


_HOLDERS = (Tensor, list, tuple, dict)
_OF_TORCH = frozenset(vars(nn.Module()))  # tables of parameters, modules, hooks


def _tensors(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (list, tuple, dict)):
        for x in value.values() if isinstance(value, dict) else value:
            yield from _tensors(x, depth - 1)


def note_methods(model: nn.Module, walk: Walk, calls: Calls) -> None:
    """Name the public methods of the model's own class that use its layers and that no traced call came through."""
    theirs = {n: f for c in reversed(type(model).__mro__) if not _of_library(c) for n, f in vars(c).items()}
    codes = {n: f.__code__ for n, f in theirs.items() if inspect.isfunction(f)}
    children = {n for n, child in model.named_children() if next(child.parameters(), None) is not None}
    reached: set[str] = set()
    waiting = [method for method, _, _ in calls]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += [n for n in codes[name].co_names if n in codes] if name in codes else []
    left = [n for n, c in codes.items() if n not in reached and n[0] != "_" and children & set(c.co_names)]
    if left:
        walk.notes.append(
            f"{type(model).__name__} has other methods that use its layers ({', '.join(left)}): what they return may "
            'lose channels, unless they are traced as well (example_inputs=[("method", args, kwargs), ...])'
        )


def _of_library(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in _LIBRARIES
