"""What a model is called with: the call is recorded, the forward doesn't run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .batches import part, peeked
from .checks import check_batch
from .conditioning import signature_of
from .isolation import stand_ins
from .loss import LossFunction, dtype_of, images_of, latents_of, make_objective
from .nested import map_tensors, moved
from .randomness import own_randomness


class Called(BaseException):
    """Ends a call where the model would run. No Exception: what calls the model may catch those."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


def recorded_call(model: nn.Module, run: Callable[[], Any]) -> dict[str, Any]:
    """The arguments, by name, of the first call of ``model`` in ``run()``, which ends there.

    Raises ValueError where ``run`` never calls the model, TypeError for arguments that its forward doesn't take.
    """
    signature = inspect.signature(model.forward)
    anything = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(signature.bind(*args, **kwargs).arguments)
        raise Called({**{k: v for k, v in given.items() if k not in anything}, **given.get("".join(anything), {})})

    handle = model.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
    try:
        run()
    except Called as called:
        return called.arguments
    finally:
        handle.remove()
    raise ValueError(f"{type(model).__name__} was never called: give example_inputs")


def first_call(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    scheduler: Any = None,
    loss_fn: LossFunction | None = None,
    seed: int = 0,
) -> tuple[Any, Iterable[Any]]:
    """What :func:`trace` needs, from the loader's first batch cut to one sample; and the loader, with nothing missing.

    The model is called as its objective calls it (:func:`make_objective`), an autoencoder by ``encode`` and ``decode``.

    Raises ValueError for an empty loader or a batch that doesn't fit the model.
    """
    with own_randomness(seed, loader):
        first, loader = peeked(loader)
        check_batch(model, first, loss_fn)
        objective = make_objective(model, scheduler, loss_fn)
        one = moved(part(first, 0, 1), next(model.parameters()).device)
        if objective.kind == "reconstruction":
            return _encode_and_decode(model, images_of(one)), loader
        noise = objective.noise(one)
        inputs = recorded_call(model, lambda: objective.loss(model, one, objective.n_timesteps // 2, noise))
    inputs = {k: v for k, v in moved(inputs, torch.device("cpu")).items() if v is not None}
    name = signature_of(model).sample
    return {**inputs, name: map_tensors(inputs[name], lambda x: torch.empty_like(x, device="meta"))}, loader


def _encode_and_decode(model: nn.Module, images: Tensor) -> list[Any]:
    """An autoencoder's two calls, apart from one another: the latents are an interface, whose channels have to stay."""
    images = images.to(dtype_of(model))
    with torch.no_grad(), stand_ins(model, ()):
        latents = latents_of(model.encode(images))  # type: ignore[operator]
    return [(n, (torch.empty_like(x, device="meta"),), {}) for n, x in (("encode", images), ("decode", latents))]
