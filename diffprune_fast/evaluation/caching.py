"""diffusers' caches beside sampling: what a transformer's blocks gave at one timestep serves at the next ones too."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..choices import Cache, check_choice

# Of the first block's residual: on the study's DiT 0.05 skips nothing in 25 steps, 0.1 almost half.
THRESHOLD = 0.1


@contextmanager
def cached(model: nn.Module, cache: Cache | Any | None) -> Iterator[None]:
    """Inside, ``model`` has the hooks of one of diffusers' caches; afterwards they are gone.

    A timestep above the last one begins a new image, for which nothing is kept.

    Args:
        model: a denoiser with diffusers' transformer blocks, pruned or not.
        cache: a name, or the config of such a cache (``diffusers.FirstBlockCacheConfig(threshold=0.2)``); None: none.

    Raises:
        ValueError: the name isn't known, or the cache doesn't know the model's blocks.

    Example:
        >>> import torch
        >>> from diffusers import DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=3, num_layers=2,
        ...                               sample_size=8, num_embeds_ada_norm=10)
        >>> with cached(model, "first-block"):
        ...     y = model(torch.randn(1, 3, 8, 8), torch.tensor([9]), torch.tensor([0]))

    Source: first-block cache (ParaAttention), pyramid attention broadcast (arXiv 2408.12588), FasterCache
    (arXiv 2410.19355), as diffusers has them.
    """
    if cache is None:
        yield
        return
    from diffusers.models.cache_utils import CacheMixin

    before = {module: dict(vars(module)) for module in model.modules()}
    known = _hooks(model)
    clock = _Clock(model, lambda: CacheMixin._reset_stateful_cache(model))
    handle = model.register_forward_pre_hook(clock, with_kwargs=True)
    try:
        _apply(model, cache, clock)
        if not {module for module, _ in _hooks(model) - known} - {model}:
            raise ValueError(f"cache {cache!r}: {type(model).__name__} has no blocks that it knows")
        with CacheMixin.cache_context(model, "sample"):
            yield
    finally:
        handle.remove()
        for module, name in _hooks(model) - known:
            vars(module)["_diffusers_hook"].remove_hook(name, recurse=False)
        for module, own in before.items():  # diffusers leaves its list of hooks there, and a forward
            for name in {"_diffusers_hook", "forward"} - own.keys():
                vars(module).pop(name, None)


class _Clock:
    """A hook before the model's forward that notes the timestep, in thousandths also where models take shares of 1."""

    def __init__(self, model: nn.Module, reset: Callable[[], None]) -> None:
        self._forward, self._reset = inspect.signature(type(model).forward), reset
        self.now, self._last = 0, float("inf")

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self._forward.bind_partial(model, *args, **kwargs).arguments.get("timestep")
        t = 0.0 if given is None else float(given.max() if hasattr(given, "max") else given)
        if t > self._last:
            self._reset()
        self._last, self.now = t, round(1000 * t if 0 < t <= 1 else t)


def _hooks(model: nn.Module) -> set[tuple[Any, str]]:
    """Modules with the names of the hooks that diffusers has put on them."""
    lists = {module: vars(module).get("_diffusers_hook") for module in model.modules()}
    return {(module, name) for module, found in lists.items() if found is not None for name in found.hooks}


def _apply(model: nn.Module, cache: Cache | Any, clock: _Clock) -> None:
    from diffusers import hooks

    kinds = {
        hooks.FirstBlockCacheConfig: hooks.apply_first_block_cache,
        hooks.PyramidAttentionBroadcastConfig: hooks.apply_pyramid_attention_broadcast,
        hooks.FasterCacheConfig: hooks.apply_faster_cache,
    }
    config = _config(cache) if isinstance(cache, str) else cache
    if type(config) not in kinds:
        raise ValueError(f"cache is a {type(cache).__name__}: give a name, or one of {[k.__name__ for k in kinds]}")
    if getattr(config, "current_timestep_callback", clock) is None:
        config = dataclasses.replace(config, current_timestep_callback=lambda: clock.now)
    try:
        kinds[type(config)](model, config)
    except (ValueError, IndexError) as e:  # an IndexError of fewer than two blocks
        raise ValueError(f"cache {cache!r}: it can't serve {type(model).__name__} ({e})") from e


def _config(name: str) -> Any:
    """Every second attention is left out between timesteps 100 and 800, the first block decides by ``THRESHOLD``."""
    from diffusers import hooks

    check_choice("cache", name, Cache)
    if name == "first-block":
        return hooks.FirstBlockCacheConfig(threshold=THRESHOLD)
    if name == "pyramid-attention":
        return hooks.PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2)
    return hooks.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 800),
        attention_weight_callback=lambda _: 0.5,
        is_guidance_distilled=True,  # it leaves out attentions, not the half of a batch that has no condition
    )
