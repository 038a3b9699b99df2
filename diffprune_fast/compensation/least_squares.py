"""Ridge regression of a layer's wanted answers on its inputs, towards the weights that it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .patches import Patches

# Beyond this the matrix is factored in single precision, whose rounding asks for a larger ridge.
WIDE = 8000
WIDE_RIDGE = 1e-2
# Steps of conjugate gradients where the matrix doesn't fit: ten reach what the factorisation gives, to .0003 of a loss
# of .047 (a UNet of 1.6M parameters); three leave .0009.
STEPS = 10
# A matrix that can't be factored gets ten times the ridge, so many times.
ATTEMPTS = 4

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """One layer: ``patches @ weight + bias`` should be ``targets``.

    targets: ``(rows, groups * outputs)``, on any device. weight: ``(groups, columns, outputs)``. bias: ``(groups *
    outputs,)``; None where the layer has none. movable: whether the bias may change. reduce: adds a tensor up over all
    ranks, which share the rows.
    """

    patches: Patches
    targets: Tensor
    weight: Tensor
    bias: Tensor | None
    movable: bool
    ridge: float
    reduce: Reduce
    low_precision: bool = False

    def wanted(self, start: int, stop: int) -> Tensor:
        """``(groups, rows, outputs)`` of the targets."""
        y = self.targets[start:stop].to(self.weight.device, self.weight.dtype)
        return y.view(len(y), len(self.weight), -1).transpose(0, 1)


@dataclass(frozen=True)
class Origin:
    """Where rows and targets are shifted to, so that no sum loses its digits, and how many rows all ranks have.

    inputs: ``(groups, 1, columns)``; answers: ``(groups, 1, outputs)``, the exact mean of the targets where the bias
    may move.
    """

    inputs: Tensor
    answers: Tensor
    rows: float


@dataclass(frozen=True)
class Sums:
    """What a pass over all rows gives, divided by their number, from the origin: ``gram`` (None where only its
    diagonal was asked for), ``cross`` with the residual of the present weights, and both means."""

    gram: Tensor | None
    diagonal: Tensor
    cross: Tensor
    inputs: Tensor
    residual: Tensor


def solve(problem: Problem, *, gradients: bool = False) -> tuple[Tensor, Tensor | None]:
    """The weight and bias that minimise squared error + ridge * mean diagonal * squared change of the weight.

    gradients: by conjugate gradients, which need no matrix of ``columns`` times ``columns``.

    Raises ArithmeticError where a sum isn't finite or the matrix can't be factored.
    """
    origin = _origin(problem)
    sums = _accumulate(problem, origin, gram=not gradients)
    if problem.movable:
        sums = _centred(sums)
    if not bool(torch.isfinite(sums.diagonal).all() & torch.isfinite(sums.cross).all()):
        raise ArithmeticError("its inputs or the dense model's outputs are not finite")
    scale = sums.diagonal.mean(-1)  # (groups,)
    change = _by_gradients(problem, origin, sums, scale) if gradients else _by_factors(sums, scale, problem.ridge)
    weight = problem.weight + change
    if not problem.movable:
        return weight, problem.bias
    inputs = origin.inputs + sums.inputs
    return weight, (origin.answers - inputs @ weight).reshape(-1)


def _origin(problem: Problem) -> Origin:
    patches, weight = problem.patches, problem.weight
    rows = float(problem.reduce(torch.tensor([len(patches)], device=weight.device)).item())
    inputs = torch.zeros(patches.groups, 1, patches.columns, dtype=weight.dtype, device=weight.device)
    answers = torch.zeros(len(weight), 1, weight.shape[-1], dtype=weight.dtype, device=weight.device)
    if problem.movable:
        shift = problem.reduce(patches.sums()) / rows
        inputs = patches.spread(shift).unsqueeze(1)
        total = problem.targets.to(weight.device).sum(0, dtype=weight.dtype)
        answers = (problem.reduce(total) / rows).view_as(answers)
    elif problem.bias is not None:
        answers = problem.bias.view_as(answers)
    return Origin(inputs, answers, rows)


def _accumulate(problem: Problem, origin: Origin, *, gram: bool) -> Sums:
    patches, weight = problem.patches, problem.weight
    groups, columns, outputs = weight.shape
    zeros = weight.new_zeros
    a = zeros(groups, columns, columns) if gram else None
    diagonal, inputs = zeros(groups, columns), zeros(groups, 1, columns)
    cross, residual = zeros(groups, columns, outputs), zeros(groups, 1, outputs)
    size = patches.chunk_rows()
    for start in range(0, len(patches), size):
        stop = min(start + size, len(patches))
        x = patches.chunk(start, stop).sub_(origin.inputs) if problem.movable else patches.chunk(start, stop)
        r = problem.wanted(start, stop) - origin.answers - x @ weight
        inputs += x.sum(1, keepdim=True)
        residual += r.sum(1, keepdim=True)
        if a is None:
            diagonal += x.square().sum(1)
            cross.baddbmm_(x.mT, r)
            continue
        add_products(a, cross, x, r, low_precision=problem.low_precision)
    if a is not None:
        a = problem.reduce(a) / origin.rows
        diagonal = a.diagonal(dim1=1, dim2=2).clone()
    else:
        diagonal = problem.reduce(diagonal) / origin.rows
    means = (problem.reduce(x) / origin.rows for x in (cross, inputs, residual))
    return Sums(a, diagonal, *means)


def add_products(a: Tensor, b: Tensor, x: Tensor, r: Tensor, *, low_precision: bool) -> None:
    """``a += x'x`` and ``b += x'r``; with operands in bfloat16, and sums in ``a``'s precision, where asked for."""
    if not low_precision:
        a.baddbmm_(x.mT, x)
        b.baddbmm_(x.mT, r)
        return
    x, r = x.bfloat16(), r.bfloat16()
    for total, right in ((a, x), (b, r)):
        total += torch.bmm(x.mT, right, out_dtype=total.dtype)


def _centred(sums: Sums) -> Sums:
    """The same about the means of the rows, instead of about the origin."""
    gram = sums.gram
    if gram is not None:
        gram.baddbmm_(sums.inputs.mT, sums.inputs, alpha=-1)
    diagonal = sums.diagonal - sums.inputs.squeeze(1).square()
    cross = sums.cross - sums.inputs.mT @ sums.residual
    return Sums(gram, diagonal, cross, sums.inputs, sums.residual)


def _by_factors(sums: Sums, scale: Tensor, ridge: float) -> Tensor:
    """``(groups, columns, outputs)``: the change of the weight, by Cholesky's factorisation."""
    assert sums.gram is not None
    gram, cross = sums.gram, sums.cross
    wide = gram.shape[-1] > WIDE
    if not wide:
        # mps has no double precision
        home = torch.device("cpu") if gram.device.type == "mps" else gram.device
        gram, cross, scale = (x.to(home, torch.float64) for x in (gram, cross, scale))
    ridge = max(ridge, WIDE_RIDGE) if wide else ridge
    # A group whose inputs are constant has nothing to be solved for: its matrix becomes the identity.
    still = scale <= torch.finfo(gram.dtype).tiny
    scale = torch.where(still, torch.ones_like(scale), scale)
    before = gram.diagonal(dim1=1, dim2=2).clone()
    for attempt in range(ATTEMPTS):
        strength = max(ridge, 1e-12) * 10**attempt if attempt else ridge
        gram.diagonal(dim1=1, dim2=2).copy_(before + (strength * scale + still.to(scale.dtype))[:, None])
        factor, failed = torch.linalg.cholesky_ex(gram)
        if not bool(failed.any()):
            change = torch.cholesky_solve(cross, factor)
            if bool(torch.isfinite(change).all()):
                return change.to(sums.cross.device, sums.cross.dtype)
    raise ArithmeticError("its inputs are too nearly dependent on one another: raise the ridge")


def _by_gradients(problem: Problem, origin: Origin, sums: Sums, scale: Tensor) -> Tensor:
    """The same by conjugate gradients, every output a system of its own; the rows are gathered anew in each step."""
    patches, strength = problem.patches, (problem.ridge * scale)[:, None, None]
    size = patches.chunk_rows()
    middle = origin.inputs + sums.inputs if problem.movable else origin.inputs

    def product(v: Tensor) -> Tensor:
        out = torch.zeros_like(v)
        for start in range(0, len(patches), size):
            x = patches.chunk(start, min(start + size, len(patches))) - middle
            out.baddbmm_(x.mT, x @ v)
        return problem.reduce(out) / origin.rows + strength * v

    change = torch.zeros_like(sums.cross)
    rest, direction = sums.cross.clone(), sums.cross.clone()
    norm = rest.square().sum(1, keepdim=True)
    first = norm.clone()
    tiny = torch.finfo(norm.dtype).tiny
    for _ in range(STEPS):
        if bool((norm <= 1e-12 * first).all()):
            break
        pushed = product(direction)
        step = norm / (direction * pushed).sum(1, keepdim=True).clamp_min(tiny)
        change += step * direction
        rest -= step * pushed
        now = rest.square().sum(1, keepdim=True)
        direction = rest + (now / norm.clamp_min(tiny)) * direction
        norm = now
    return change
