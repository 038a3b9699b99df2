"""The weights of rotated heads: worked out on the side, put in place as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .heads import HeadPair, Place

Turning = tuple[HeadPair, Tensor, Tensor]  # a pair, A and its inverse


def of_heads(weight: Tensor, place: Place) -> Tensor:
    """A place's weights as ``(n_heads, head_dim, everything else)``, in float64 on the host."""
    channels = torch.from_numpy(place.channels.reshape(-1)).to(weight.device)
    chosen = weight.detach().index_select(place.dim, channels).movedim(place.dim, 0)
    return chosen.cpu().double().reshape(*place.channels.shape, -1)


def gram(parameters: Mapping[str, nn.Parameter], places: Iterable[Place]) -> Tensor:
    """The products of the rows of all weights and biases on one side, ``(n_heads, head_dim, head_dim)``."""
    rows = torch.cat([of_heads(parameters[p.parameter], p) for p in places], -1)
    return rows @ rows.mT


def turned(parameters: Mapping[str, nn.Parameter], turnings: Iterable[Turning]) -> dict[str, Tensor]:
    """New values of every parameter that is concerned, in its own dtype and on its device; nothing is changed yet."""
    changes: dict[str, list[tuple[Place, Tensor]]] = {}
    for pair, a, inverse in turnings:
        for matrix, places in ((a.mT, pair.left), (inverse, pair.right)):
            for place in places:
                changes.setdefault(place.parameter, []).append((place, matrix))
    new: dict[str, Tensor] = {}
    for name, several in changes.items():
        old = parameters[name]
        new[name] = old.detach().clone()
        for place, matrix in several:
            rows = (matrix @ of_heads(old, place)).flatten(0, 1)
            view = new[name].movedim(place.dim, 0)
            channels = torch.from_numpy(place.channels.reshape(-1)).to(old.device)
            view[channels] = rows.reshape(len(rows), *view.shape[1:]).to(old.device, old.dtype)
    return new


def put(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Write values into the parameters' own memory."""
    for name, value in values.items():
        with torch.inference_mode() if parameters[name].is_inference() else torch.no_grad():
            parameters[name].copy_(value)
