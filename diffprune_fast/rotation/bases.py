"""The bases of heads: from second moments, in double precision, on the host."""

from __future__ import annotations

import torch
from torch import Tensor

# What is added to the moments, as a share of their mean. Directions that calibration hardly excites may carry large
# weights, which an unregularised basis blows up on one side and cancels on the other.
RIDGES = (1e-10, 1e-8, 1e-6, 1e-4, 1e-2, 1.0)
# How much the products of the two sides' weight norms may grow, over all dims of a head: rounding grows with them.
GROWTH = 2.0


def turning(left: Tensor, right: Tensor, left_gram: Tensor, right_gram: Tensor) -> tuple[Tensor, Tensor]:
    """``A`` and its inverse, ``(n_heads, d, d)`` each: ``A'`` goes to the left side's weights, ``A^-1`` to the right's.

    With Cholesky factors ``left = L L'`` and ``right = R R'`` and the SVD ``L' R = U S V'``, ``A = L'^-1 U``: keeping
    the first dims is then the best approximation of the product among all of that rank, whatever their number. Each
    dim is scaled so that its weights on both sides are equally large.

    left, right: ``(n_heads, d, d)`` second moments of the two sides' values, up to a factor. left_gram, right_gram: the
    products of their weights' rows, ``W W'``. All in float64.
    """
    eye = torch.eye(left.shape[-1], dtype=left.dtype).expand_as(left)
    before = (_norms(left_gram, eye) * _norms(right_gram, eye)).sum(-1)
    a, inverse = eye.clone(), eye.clone()
    waiting = torch.ones(len(left), dtype=torch.bool)
    for ridge in RIDGES:
        turned, back, sound = _turned(left, right, ridge)
        norms = _norms(left_gram, turned.mT), _norms(right_gram, back)
        sound &= (norms[0] * norms[1]).sum(-1) <= GROWTH * before
        now = waiting & (sound | (ridge == RIDGES[-1]))
        scale = _balance(*norms)
        a[now] = (turned * scale[:, None, :])[now]
        inverse[now] = (back / scale[:, :, None])[now]
        waiting &= ~now
        if not waiting.any():
            break
    return a, inverse


def _turned(left: Tensor, right: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """``A``, its inverse, and where that went well, ``(n_heads,)``."""
    (l, bad_l), (r, bad_r) = (torch.linalg.cholesky_ex(_ridged(m, ridge)) for m in (left, right))
    well = (bad_l == 0) & (bad_r == 0)
    eye = torch.eye(left.shape[-1], dtype=left.dtype)
    l, r = (torch.where(well[:, None, None], x, eye) for x in (l, r))
    u = torch.linalg.svd(l.mT @ r)[0]
    return torch.linalg.solve_triangular(l.mT, u, upper=True), u.mT @ l.mT, well


def _ridged(moment: Tensor, ridge: float) -> Tensor:
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))  # a head that is always zero
    return moment / mean[:, None, None] + ridge * torch.eye(moment.shape[-1], dtype=moment.dtype)


def _norms(gram: Tensor, rows: Tensor) -> Tensor:
    """Norms of the rows of ``rows @ W``, ``(n_heads, d)``."""
    return (rows @ gram * rows).sum(-1).clamp_min(0).sqrt()


def _balance(left: Tensor, right: Tensor) -> Tensor:
    floor = 1e-12
    left, right = (x.clamp_min(floor * float(x.max())).clamp_min(1e-300) for x in (left, right))
    return (right / left).sqrt()
