"""Where random numbers come from: places in the seed's tree, and a global state that is left as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

# Places in the seed's tree: no two uses draw the same numbers.
NOISE, TIMESTEPS = 1, 2


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
    owners = (loader, getattr(loader, "sampler", None))
    own = [g for g in (getattr(o, "generator", None) for o in owners) if isinstance(g, torch.Generator)]
    states = [g.get_state() for g in own]
    python, numpy_state, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    # Asking CUDA for its state would start it where nobody uses it.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - what datasets draw from
        torch.default_generator.manual_seed(seed)
        if cuda is not None:
            torch.cuda.manual_seed_all(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(cpu)
        for generator, state in zip(own, states):
            generator.set_state(state)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def generator_for(seed: int, *place: int) -> torch.Generator:
    """A CPU generator of its own for every place in the work, so that no number depends on who draws it or when."""
    words = np.random.SeedSequence([seed % 2**63, *place]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]) % 2**63)
