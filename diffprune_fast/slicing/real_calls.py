"""Calls of PyTorch in a real forward: written down for the sliced model, compared for the masked dense one.

They are seen as the forward's code makes them, above any device's kernels, so that both models' lists are comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

Cut = Callable[[str, Tensor], Tensor]


# Larger parameters are made when they are used and forgotten after: the proof needs little memory.
_LARGE = 1 << 20


class Incomparable(Exception):
    """The masked model can't stand for the sliced one, and why."""


class Different(Exception):
    """The sliced model computes something else, and what."""


@dataclass
class Called:
    """A call of PyTorch's: its function, the sizes of its tensors, its other arguments, the sizes of its outputs."""

    function: Any
    sizes: list[torch.Size]
    rest: tuple[Any, ...]
    out: list[torch.Size]


class Recorder(TorchFunctionMode):
    """Writes down the calls of PyTorch that give tensors, and makes large parameters where they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Called] = []
        self.made: dict[int, Callable[[], Tensor]] = {}  # by stand-in
        self.device = torch.device("cpu")

    def stand_in(self, name: str, t: Tensor, cut: Cut) -> Tensor:
        """What takes a parameter's place: what ``cut`` makes of it, or something of that shape until it is used."""
        large = t.numel() > _LARGE
        held = cut(name, torch.empty_like(t, device="meta") if large else t.detach())
        if isinstance(t, nn.Parameter):
            held = nn.Parameter(held, requires_grad=False)
        if large:
            self.made[id(held)] = lambda: cut(name, t.detach())
            self.device = t.device
        return held

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.made and func == _DEVICE and id(args[0]) in self.made:
            return self.device
        if self.made and func not in _SHAPES:
            args, kwargs = tree_map_only(Tensor, self._real, (args, kwargs))
        return self.call(func, args, kwargs)

    def _real(self, t: Tensor) -> Tensor:
        make = self.made.get(id(t))
        return t if make is None else make()

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        outs = _tensors(out)
        if outs:
            sizes = [t.shape for t in _tensors((args, kwargs))]
            rest = tuple([a for a in (*args, *kwargs.values()) if isinstance(a, (int, float))])
            self.calls.append(Called(func, sizes, rest, [o.shape for o in outs]))
        return out


class Masked(Recorder):
    """Compares the calls with those of the sliced model; norms and means run over as many channels as there."""

    def __init__(self, expected: Sequence[Called]) -> None:
        super().__init__()
        self.expected = expected

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        at = len(self.calls)
        like = self.expected[at] if at < len(self.expected) else None
        if like is not None and like.function == func and func in _OVER_CHANNELS:
            out = _OVER_CHANNELS[func](like, func, *args, **kwargs)
            self.calls.append(like)
            return out
        out = super().call(func, args, kwargs)
        if len(self.calls) > at:
            mine = self.calls[at]
            if like is None or like.function != func:
                raise Different(f"{_name(func)} in place of {'nothing' if like is None else _name(like.function)}")
            if func in _RANDOM and mine.out != like.out:
                raise Incomparable("the forward draws noise of a width that changes")
        return out

    def end(self) -> None:
        if len(self.calls) < len(self.expected):
            raise Different(f"{_name(self.expected[len(self.calls)].function)} is left out in the dense model")


def _name(func: Any) -> str:
    return getattr(func, "__name__", str(func))


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, (list, tuple)):
        return [t for x in tree for t in _tensors(x)]
    return [t for x in tree.values() for t in _tensors(x)] if isinstance(tree, dict) else []


def _group_norm(
    like: Called,
    func: Any,
    x: Tensor,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    n = like.sizes[0][1]
    if n == x.shape[1]:
        return func(x, num_groups, weight, bias, eps)
    kept = _kept([weight, bias] if weight is not None else [x.movedim(1, 0).flatten(1)], n)
    w, b = (None if p is None else p[kept] for p in (weight, bias))
    groups = next(r for r in like.rest if isinstance(r, int))
    return torch.zeros_like(x).index_copy_(1, kept, F.group_norm(x[:, kept], groups, w, b, eps))


def _kept(rows: Sequence[Tensor | None], n: int) -> Tensor:
    """The ``n`` rows that aren't all zero."""
    alive = torch.stack([(r != 0).reshape(len(r), -1).any(1) for r in rows if r is not None]).any(0)
    found = alive.nonzero().flatten()
    if len(found) != n:
        raise Incomparable("channels of a norm can't be told apart from those that went")
    return found


def _layer_norm(
    like: Called, func: Any, x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    n = like.sizes[0][-1]
    if n == x.shape[-1] or len(shape) != 1:
        return func(x, shape, weight, bias, eps)
    there = (x if weight is None else weight) != 0
    centred = (x - x.sum(-1, keepdim=True) / n) * there
    out = centred * torch.rsqrt(centred.square().sum(-1, keepdim=True) / n + eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def _rms_norm(like: Called, func: Any, x: Tensor, shape: Any, weight: Any = None, eps: Any = None) -> Tensor:
    n = like.sizes[0][-1]
    if n == x.shape[-1] or len(shape) != 1:
        return func(x, shape, weight, eps)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    out = x * torch.rsqrt(x.square().sum(-1, keepdim=True) / n + eps)
    return out if weight is None else out * weight


def _mean(like: Called, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A mean over channels of which some are zero."""
    out = func(x, *args, **kwargs)
    theirs = like.sizes[0]
    dims = [d for d in range(x.dim()) if x.shape[d] != theirs[d]] if len(theirs) == x.dim() else []
    asked = args[0] if args else kwargs.get("dim")
    over = (
        range(x.dim())
        if asked is None
        else [d % x.dim() for d in (asked if isinstance(asked, (list, tuple)) else [asked])]
    )
    for d in dims:
        if d in over:
            if int((x != 0).movedim(d, 0).flatten(1).any(1).sum()) > theirs[d] and x.dim() == 2:
                raise Incomparable("a mean is over channels that aren't zero where they went")
            out = out * (x.shape[d] / theirs[d])
    return out


def _sub(like: Called, func: Any, x: Tensor, other: Any, **kwargs: Any) -> Tensor:
    """Less a mean over channels, say: those that went stay zero."""
    out = func(x, other, **kwargs)
    sizes = like.out[0]
    for d in range(x.dim() if x.shape == out.shape and len(sizes) == x.dim() else 0):
        if out.shape[d] != sizes[d] and isinstance(other, Tensor) and d >= x.dim() - other.dim():
            there = (x != 0).movedim(d, 0).flatten(1).any(1)
            if other.shape[d - x.dim()] == 1 and int(there.sum()) == sizes[d]:
                out = out * there.reshape([-1 if e == d else 1 for e in range(x.dim())])
    return out


def _spread(like: Called, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A variance over the channels that aren't zero, where some are."""
    theirs = like.sizes[0]
    for d in [d for d in range(x.dim()) if len(theirs) == x.dim() and x.shape[d] != theirs[d]]:
        out = func(x, *args, **kwargs)
        if any(o.dim() == x.dim() and o.shape[d] == 1 for o in _tensors(out)):
            x = x.index_select(d, _kept([x.movedim(d, 0).flatten(1)], theirs[d]))
    return func(x, *args, **kwargs)


_DEVICE = Tensor.device.__get__


# They ask a parameter for what a stand-in without values knows.
_SHAPES = frozenset(
    (
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.stride, Tensor.__len__),
        *(
            getattr(Tensor, n).__get__
            for n in ("shape", "dtype", "ndim", "requires_grad", "layout", "grad", "is_sparse")
        ),
    )
)


_RANDOM = frozenset((torch.randn, torch.randn_like, torch.rand, torch.rand_like, torch.normal, torch.bernoulli))


_OVER_CHANNELS: dict[Any, Callable[..., Tensor]] = {
    F.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    Tensor.mean: _mean,
    torch.mean: _mean,
    **dict.fromkeys((Tensor.sub, Tensor.__sub__, torch.sub), _sub),
    **dict.fromkeys((Tensor.var, torch.var, Tensor.std, torch.std, torch.var_mean, torch.std_mean), _spread),
}
