"""The algebra of a head's basis, on moments whose right answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffprune_fast.rotation.bases import turning


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _moment(heads: int = 3, d: int = 8, rank: int = 8, seed: int = 0) -> Tensor:
    rows = _random(heads, d, rank, seed=seed)
    return rows @ rows.mT


def _kept(moments: tuple[Tensor, Tensor], turned: tuple[Tensor, Tensor], n: int) -> Tensor:
    """The squared error of every head's products, ``(heads,)``, when only the first ``n`` dims stay."""
    left, right = moments
    a, inverse = turned
    lost = torch.eye(a.shape[-1], dtype=a.dtype) - a[..., :n] @ inverse[:, :n]
    return (lost.mT @ left @ lost @ right).diagonal(dim1=-2, dim2=-1).sum(-1)


def test_the_inverse_is_the_inverse():
    a, inverse = turning(*(_moment(seed=s) for s in range(4)))
    assert torch.allclose(a @ inverse, torch.eye(8, dtype=torch.float64).expand(3, 8, 8), atol=1e-9)


@pytest.mark.parametrize("n", [1, 3, 6])
def test_the_first_dims_are_the_best_of_that_number(n):
    moments = _moment(seed=0), _moment(seed=1)
    l, r = (torch.linalg.cholesky(m) for m in moments)
    best = torch.linalg.svdvals(l.mT @ r)[:, n:].square().sum(-1)  # Eckart and Young
    turned = turning(*moments, _moment(seed=2), _moment(seed=3))
    assert torch.allclose(_kept(moments, turned, n), best, rtol=1e-5)


def test_a_side_of_low_rank_ends_in_dims_that_carry_nothing():
    moments = _moment(rank=3, seed=0), _moment(seed=1)
    turned = turning(*moments, moments[0], _moment(seed=3))
    assert (_kept(moments, turned, 3) < 1e-9 * _kept(moments, turned, 0)).all()


def test_both_sides_weights_of_a_dim_are_equally_large():
    grams = _moment(seed=2), _moment(seed=3)
    a, inverse = turning(_moment(seed=0), _moment(seed=1), *grams)
    left, right = (
        (a.mT @ grams[0] @ a).diagonal(dim1=-2, dim2=-1),
        (inverse @ grams[1] @ inverse.mT).diagonal(0, -2, -1),
    )
    assert torch.allclose(left, right, rtol=1e-9)


def test_weights_that_calibration_does_not_excite_are_not_blown_up():
    quiet = torch.diag(torch.tensor([1.0] * 4 + [1e-14] * 4, dtype=torch.float64)).expand(3, 8, 8)
    grams = torch.eye(8, dtype=torch.float64).expand(3, 8, 8), _moment(seed=3)
    a, inverse = turning(quiet, _moment(seed=1), *grams)
    norms = (a.mT @ a).diagonal(dim1=-2, dim2=-1).sqrt() * (inverse @ grams[1] @ inverse.mT).diagonal(0, -2, -1).sqrt()
    before = grams[1].diagonal(dim1=-2, dim2=-1).sqrt().sum(-1)
    assert (norms.sum(-1) <= 2 * before).all()


def test_a_head_that_is_always_zero_keeps_a_sound_basis():
    zero = torch.zeros(3, 8, 8, dtype=torch.float64)
    a, inverse = turning(zero, _moment(seed=1), zero, _moment(seed=3))
    assert a.isfinite().all()
    assert inverse.isfinite().all()
