"""Second moments of heads: what hooks on linear layers see while the model runs."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..objective.loss_run import sum_dtype
from ..objective.ranks import summed_over_ranks
from .heads import HeadPair, Place

Side = tuple[int, int]  # a pair, and 0 for its left side or 1 for its right


class Moments:
    """While inside, adds up the second moments of all heads of ``pairs``; :meth:`end` closes every forward.

    Queries and keys are seen at the outputs of their layers, keys less their mean over a sample's tokens; values, mixed
    by the softmax, at the inputs of what reads the heads.
    """

    def __init__(self, model: nn.Module, pairs: Sequence[HeadPair], device: torch.device) -> None:
        self._model, self._pairs = model, pairs
        wide = sum_dtype(device)
        self._sums: dict[Side, Tensor] = {}
        self._tokens: dict[Side, list[tuple[Tensor, int]]] = {}
        self._handles: list[Any] = []
        for i, pair in enumerate(pairs):
            n, d = pair.shape
            for side in (0, 1) if pair.kind == "qk" else (0,):
                self._sums[i, side] = torch.zeros(n, d, d, dtype=wide, device=device)

    def __enter__(self) -> Moments:
        for i, pair in enumerate(self._pairs):
            watched = [(0, p) for p in pair.left] + [(1, p) for p in pair.right]
            for side, place in watched if pair.kind == "qk" else [(0, p) for p in pair.right]:
                if place.is_weight:
                    self._watch((i, side), place)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: Any, traceback: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    def end(self) -> None:
        """The forward is over: take from its keys their means over the tokens."""
        for side, seen in self._tokens.items():
            batches = {len(total) for total, _ in seen}
            together = [seen] if len(batches) == 1 else [[one] for one in seen]
            for parts in together:
                total = torch.stack([t for t, _ in parts]).sum(0)
                self._sums[side] -= torch.einsum("bhi,bhj->hij", total, total) / sum(n for _, n in parts)
        self._tokens.clear()

    def of(self, i: int) -> list[Tensor]:
        """The moments of a pair's sides, of all ranks, ``(n_heads, d, d)`` each, on the host; of ``vo`` the left one.

        Raises FloatingPointError, naming the attention, where they aren't finite.
        """
        found = [summed_over_ranks(self._sums[i, s]).cpu().double() for s in (0, 1) if (i, s) in self._sums]
        if not all(bool(m.isfinite().all()) for m in found):
            raise FloatingPointError(f"NaN or infinite activations in {self._pairs[i].attention}")
        return found

    def _watch(self, side: Side, place: Place) -> None:
        module = self._model.get_submodule(place.module)
        channels = torch.from_numpy(place.channels.reshape(-1)).to(self._sums[side].device)
        if place.dim == 0:
            self._handles.append(module.register_forward_hook(lambda _, args, out: self._see(side, channels, out)))
        else:
            self._handles.append(module.register_forward_pre_hook(lambda _, args: self._see(side, channels, args[0])))

    def _see(self, side: Side, channels: Tensor, values: Tensor) -> None:
        total = self._sums[side]
        rows = values.detach().reshape(len(values) if values.ndim > 2 else 1, -1, values.shape[-1])
        heads = rows.index_select(-1, channels).reshape(*rows.shape[:2], *total.shape[:2])
        heads = heads if heads.dtype == torch.float64 else heads.float()
        flat = heads.flatten(0, 1).transpose(0, 1)
        total += (flat.mT @ flat).to(total.dtype)
        if side[1] and self._pairs[side[0]].centred:
            self._tokens.setdefault(side, []).append((heads.sum(1, dtype=total.dtype), heads.shape[1]))
