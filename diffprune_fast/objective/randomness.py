"""Where random numbers come from: places in the seed's tree, and a global state that is left as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Places in the seed's tree: no two uses draw the same numbers.
NOISE, TIMESTEPS = 1, 2
# From here a loss draws what it draws itself.
DRAWN_BY_LOSS = 5


# t = T * u^1.5: calibrated there a digits model's held-out loss at half its MACs was .0334, uniform t .0343, u^2 .0334.
EARLY = 1.5


def early_timesteps(n_timesteps: int, n: int, generator: torch.Generator) -> Tensor:
    """``(n,)`` timesteps ``T * u^1.5``, u from each of ``n`` equal strips of [0, 1), in random order."""
    u = (torch.arange(n) + torch.rand(n, generator=generator, dtype=torch.float64)) / max(n, 1)
    t = (n_timesteps * u**EARLY).long().clamp(max=n_timesteps - 1)
    return t[torch.randperm(n, generator=generator)]


def stratified(allowed: np.ndarray, n: int, generator: torch.Generator) -> Tensor:
    """``(n,)`` timesteps, one from each of ``n`` equal strata of ``allowed``, in random order."""
    where = (torch.arange(n) + torch.rand(n, generator=generator, dtype=torch.float64)) / n * len(allowed)
    drawn = torch.from_numpy(np.asarray(allowed, np.int64))[where.long().clamp(max=len(allowed) - 1)]
    return drawn[torch.randperm(n, generator=generator)]


@contextmanager
def own_randomness(seed: int, loader: object = None) -> Iterator[None]:
    """Seed every global generator that a loader or a model may draw from, and give all of them back as they were.

    loader: its own generators (a DataLoader's, its sampler's) are given back too, so that the next call sees the same.
    """
    states, own = global_states(), own_states(loader)
    try:
        seed_globally(seed)
        yield
    finally:
        set_global_states(states)
        set_own_states(loader, own)


def seed_globally(seed: int) -> None:
    """Seed every global generator, of Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - what datasets draw from
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # asking CUDA would start it where nobody uses it
        torch.cuda.manual_seed_all(seed)


class Stream:
    """Numbers of the global generators that go on where they stopped, whatever was drawn outside in between.

    ``with stream:`` draws from it. states: as :func:`global_states` has them.
    """

    def __init__(self, seed: int) -> None:
        with own_randomness(seed):
            self.states = global_states()

    def __enter__(self) -> None:
        self._outside = global_states()
        set_global_states(self.states)

    def __exit__(self, *_: object) -> None:
        self.states = global_states()
        set_global_states(self._outside)


def global_states() -> dict[str, Any]:
    """The states of Python's, NumPy's and PyTorch's global generators, of plain values and tensors."""
    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state()  # noqa: NPY002
    name, keys, *rest = legacy
    return {
        "python": (version, torch.tensor(words), gauss),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_global_states(states: Mapping[str, Any]) -> None:
    """Put the global generators back to what :func:`global_states` found."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_initialized():
        torch.cuda.set_rng_state_all(states["cuda"][: torch.cuda.device_count()])


def own_states(loader: object) -> list[Tensor]:
    """The states of a loader's own generators: a DataLoader's, its sampler's."""
    return [generator.get_state() for generator in _generators(loader)]


def set_own_states(loader: object, states: list[Tensor]) -> None:
    """Put a loader's own generators back to what :func:`own_states` found."""
    for generator, state in zip(_generators(loader), states):
        generator.set_state(state)


def _generators(loader: object) -> list[torch.Generator]:
    owners = (loader, getattr(loader, "sampler", None))
    return [g for g in (getattr(o, "generator", None) for o in owners) if isinstance(g, torch.Generator)]


def generator_for(seed: int, *place: int) -> torch.Generator:
    """A CPU generator of its own for every place in the work, so that no number depends on who draws it or when."""
    return torch.Generator().manual_seed(seed_at(seed, *place))


def seed_at(seed: int, *place: int) -> int:
    """The seed of a place in the seed's tree."""
    words = np.random.SeedSequence([seed % 2**63, *place]).generate_state(1, np.uint64)
    return int(words[0]) % 2**63
