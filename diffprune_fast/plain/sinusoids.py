"""The sinusoids that a UNet's time embedding begins with: a config gives it as many as its first level is wide.

Fewer of them have other frequencies, and then the embedding can't say what it said. ``freq_shift`` moves the
frequencies: with the right one they are some of those that were there. What is left out are the lowest, which are
nearly straight lines over all timesteps, so that others can stand in for them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Of the ridge that solves a layer for other sinusoids, as a share of their mean square: what rounding needs, no more.
RIDGE = 1e-9

# From here on (of the embedding's standard deviation over time) fewer sinusoids say what more of them did.
NO_CHANGE = 1e-3


def readers(model: nn.Module, fresh: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Embeddings that read sinusoids of another number: name, the sinusoids as they are and as they are to be."""
    from diffusers.models.embeddings import TimestepEmbedding, Timesteps

    theirs: dict[str, Any] = dict(fresh.named_modules())
    of_width: dict[tuple[int, int], tuple[nn.Module, nn.Module]] = {}
    for path, module in model.named_modules():
        other: Any = theirs.get(path)
        if type(module) is Timesteps and type(other) is Timesteps and module.num_channels != other.num_channels:
            of_width[module.num_channels, other.num_channels] = module, other
    for path, module in model.named_modules():
        other = theirs.get(path)
        if type(module) is TimestepEmbedding and type(other) is TimestepEmbedding and module.cond_proj is None:
            pair = of_width.get((module.linear_1.weight.shape[1], other.linear_1.weight.shape[1]))
            if pair is not None:
                yield path, *pair


def solve(layer: Any, old: nn.Module, new: nn.Module, steps: int) -> None:
    """Give a linear layer the weights with which it answers to the new sinusoids what it did to the old ones."""
    t = torch.arange(steps, device=layer.weight.device)
    before, now = old(t).double(), new(t).double()
    mean_before, mean_now = before.mean(0), now.mean(0)
    x, y = now - mean_now, before - mean_before
    gram = x.T @ x
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    mixing = torch.linalg.solve(gram, x.T @ y).T  # (old channels, new channels)
    weight = layer.weight.detach().double()
    if layer.bias is not None:
        layer.bias.data.add_((weight @ (mean_before - mixing @ mean_now)).to(layer.bias.dtype))
    layer.weight.data = (weight @ mixing).to(layer.weight.dtype)
    layer.weight.grad = None  # of weights that are gone
    layer.in_features = layer.weight.shape[1]


def frequencies(model: Any, updates: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The ``freq_shift`` with which the time embedding of a narrower first level changes least; nothing where the
    updates say it, or where there are no such sinusoids."""
    widths, own = updates.get("block_out_channels"), model.config
    sinusoids: Any = getattr(model, "time_proj", None)
    if widths is None or "freq_shift" in updates or "freq_shift" not in own:
        return {}
    if not hasattr(sinusoids, "downscale_freq_shift") or not 2 <= widths[0] < sinusoids.num_channels:
        return {}
    half, spacing = widths[0] // 2, sinusoids.num_channels // 2 - sinusoids.downscale_freq_shift
    best, least = own["freq_shift"], float("inf")
    for steps_between in range(int(spacing), half - int(own["freq_shift"]) - 1, -1):
        new = copy.copy(sinusoids)
        new.num_channels, new.downscale_freq_shift = widths[0], half - steps_between
        changed = _change(model.time_embedding, sinusoids, new, steps)
        if changed < least:
            best, least = half - steps_between, changed
        if changed < NO_CHANGE:
            break
    return {} if best == own["freq_shift"] else {"freq_shift": best}


@torch.no_grad()
def _change(embedding: nn.Module, old: nn.Module, new: nn.Module, steps: int) -> float:
    """How much the embedding of all timesteps changes, as a share of its deviation over time."""
    twin: Any = copy.deepcopy(embedding).float()
    t = torch.arange(steps, device=next(twin.parameters()).device)
    before: Tensor = twin(old(t).float())
    solve(twin.linear_1, old, new, steps)
    moved = twin(new(t).float()) - before
    return float((moved.square().mean() / (before - before.mean(0)).square().mean().clamp_min(1e-30)).sqrt())
