"""Gauss-Newton unit scores: how much the model's output changes, to first order, when a unit's consumers lose it.

First-order scores of a loss don't compare between groups; these do, because all of them are in units of the output's
squared error. For the output ``y`` of a sample with ``n`` elements and ``z ~ N(0, 1 / n)``, independent in every
sample, the sum over a unit's weights of ``theta * d<y, z> / d theta`` is a draw whose mean square is the mean squared
change of ``y``. No target is needed, and no threshold: timesteps that a loss leaves out are in the model's way too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ..architectures.layers import CONVOLUTIONS, TRANSPOSED
from ..objective.batches import count
from ..objective.outputs import outputs_seen
from ..objective.randomness import DRAWN_BY_LOSS, generator_for
from ..objective.ranks import rank_and_count, summed_over_ranks
from ..objective.shards import Shard
from ..plan.plan import Member, Plan
from ..progress import bar
from .estimators import BUCKET_BYTES, GradientHooks, Work, add_scores
from .state import State
from .tables import UnitTable, unit_table

# The probes' place in the seed's tree; the others are in objective.randomness and score.
PROBES = 4
# A micro-batch gives one draw, however many samples are in it: small ones say more for the same work. With 512 samples
# the digits model at half its MACs had a loss of 0.077 by draws of 4 and 0.081 by draws of 32 (means of three seeds,
# before any compensation; the same passes as the loss's, above its threshold, in draws of 32: 0.089).
SAMPLES_OF_A_DRAW = 4
SAMPLES = 512
# Draws between two times that the ranks add up what they have, where it is to be kept.
CHECK_EVERY = 16


def consumer_table(plan: Plan, model: nn.Module, parts: Mapping[str, Shard] | None = None) -> UnitTable:
    """The table of :func:`consumer_members`."""
    return unit_table(plan, members=consumer_members(plan, model), parts=parts)


def consumer_members(plan: Plan, model: nn.Module) -> dict[str, list[Member]]:
    """Per group, the places where its channels are read: input channels of convolutions and linear layers.

    What makes, shifts or normalises a channel on its way there would count the same change again. A group that nobody
    reads through weights (queries and keys meet each other) has the rows of one layer that makes it, with their bias:
    ``q * dL/dq`` summed over a sample is ``k * dL/dk``, so one side says it all.
    """
    modules, by_norm = dict(model.named_modules()), {f.direction: f.gain for f in plan.norm_fixes}
    members = {}
    for group in plan.groups:
        there = [m for m in group.members if m.parameter not in plan.buffers]
        dims = [_read_dim(modules, m.parameter, m.parameter in by_norm) for m in there]
        read = [m for m, dim in zip(there, dims) if m.dim == dim]
        makers = [m for m, dim in zip(there, dims) if dim is not None and m.dim == 1 - dim]
        gains = [m for m in there if m.parameter in by_norm.values()]  # a direction's rows have no gradient along them
        makers = [m for m in makers if m.parameter not in by_norm] or gains
        members[group.name] = read or _one_side(makers or there[:1], there)
    return members


def _read_dim(modules: Mapping[str, nn.Module], parameter: str, by_norm: bool) -> int | None:
    """The dim of a convolution's or linear layer's weight that meets its input; None for every other parameter.

    by_norm: the parameter is the direction of such a weight (weight_norm).
    """
    owner, _, leaf = parameter.rpartition(".")
    if by_norm:
        owner, leaf = owner.removesuffix(".parametrizations.weight"), "weight"
    module = modules.get(owner)
    if isinstance(module, nn.MultiheadAttention):
        return 1 if leaf.endswith("proj_weight") else None
    if leaf != "weight" or _is_depthwise(module):
        return None
    if isinstance(module, TRANSPOSED):
        return 0
    return 1 if isinstance(module, (nn.Linear, *CONVOLUTIONS)) else None


def _is_depthwise(module: nn.Module | None) -> bool:
    """A channel passes through such a convolution on its own, as through a norm."""
    return isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) and module.weight.shape[1] == 1 and module.groups > 1


def _one_side(makers: list[Member], there: list[Member]) -> list[Member]:
    """The first of the layers that make a group's channels, with its bias."""
    if not makers:
        return []
    first = makers[0]
    bias = first.parameter.removesuffix("weight") + "bias"
    side = [first, *(m for m in there if m.parameter == bias and m is not first)]
    times = first.index.shape[1]
    if len(makers) == 1 and times % 2 == 0:
        # Both sides are rows of one weight (a fused projection): the queries come first.
        side = [replace(m, index=m.index[:, : times // 2]) for m in side]
    return side


class Probe:
    """Takes ``<y, z>`` of the model's output ``y`` from whatever calls the model.

    The output is that of the last call, with a gradient, of the model; where an objective calls parts of it in place of
    its forward, of the last part that no other part had called.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._generator = torch.Generator()
        self._product: Tensor | None = None

    def forward(self, k: int, loss: Callable[[], Tensor]) -> Tensor | None:
        """The product with the random numbers of micro-batch ``k``; None where ``loss`` called nothing."""
        self._generator, self._product = generator_for(self._work.seed, PROBES, k), None
        try:
            with outputs_seen(self._work.model, self._work.objective.kind, self._see):
                loss()
            return self._product
        finally:
            self._product = None

    def _see(self, outputs: list[Tensor]) -> None:
        outputs = [y for y in outputs if y.requires_grad]
        if not outputs:
            return
        samples = outputs[0].shape[0] if outputs[0].ndim else 1
        size = sum(y.numel() for y in outputs) / samples
        products = [(self._draw(y) * y.to(_wide(y))).sum() for y in outputs]
        self._product = torch.stack(products).sum() / size**0.5

    def _draw(self, y: Tensor) -> Tensor:
        z = torch.randn(y.shape, generator=self._generator, dtype=torch.float32)
        return z.to(y.device, _wide(y), non_blocking=True)


def _wide(y: Tensor) -> torch.dtype:
    return torch.float64 if y.dtype == torch.float64 else torch.float32


class Damage:
    """Adds up squares over micro-batches; the ranks share them."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._table = consumer_table(work.plan, work.model, work.parts)
        self._parameters = {n: work.parameters[n] for n in self._table.parameters}
        self._hooks = GradientHooks(self._parameters)
        self._probe = Probe(work)
        self._current, self._sum = work.new_scores(), work.new_scores()
        self._waiting: list[str] = []
        self._bytes = 0
        self.seen = True

    def add(self, k: int, loss: Callable[[], Tensor]) -> None:
        """One draw, of all samples of micro-batch ``k`` together; nothing once the output could not be seen."""
        if not self.seen:
            return
        product = self._probe.forward(k, loss)
        self.seen = product is not None
        if product is None or not (self._parameters or self._work.shards):
            return  # of a sharded model every rank takes part, whatever it counts
        self._current.zero_()
        with self._hooks.calling(self._arrived):
            self._work.backward(product, list(self._parameters.values()))
            self._flush()
        self._work.of_all_shards(self._current)
        self._sum += self._current.square()

    def total(self) -> Tensor:
        """``(n_units,)``: the sum of all ranks."""
        return self._work.of_all_batches(self._sum)

    def restore(self, total: Tensor) -> None:
        """Begin with the sum of before."""
        if self._work.sharing[0] == 0:
            self._sum.copy_(total)

    def mean(self, samples: int) -> np.ndarray | None:
        """``(n_units,)``: the mean over ``samples``, those of all ranks; None where no output was seen.

        Raises FloatingPointError where it isn't finite.
        """
        if not bool(summed_over_ranks(torch.tensor(float(self.seen), device=self._work.device))):
            return None
        values = self.total().double().cpu().numpy() / samples
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            plan = self._work.plan
            name = plan.groups[plan.group_of[bad[0]]].name
            raise FloatingPointError(
                f"the gradient of the model's output is NaN or infinite in the group {name}: try the model in "
                "single precision or autocast='bf16', and look for images that are out of range"
            )
        return values

    def _arrived(self, name: str, p: Tensor) -> None:
        assert p.grad is not None
        self._waiting.append(name)
        self._bytes += p.grad.nbytes
        if self._bytes >= BUCKET_BYTES:
            self._flush()

    def _flush(self) -> None:
        add_scores(self._current, self._work, self._table, self._waiting, "signed", again=True)
        for name in self._waiting:
            self._work.parameters[name].grad = None
        self._waiting, self._bytes = [], 0


def estimated_damage(
    work: Work, *, allowed: np.ndarray, micro_batch: int, samples: int, state: State
) -> np.ndarray | None:
    """The Gauss-Newton scores, ``(n_units,)``; None where the loss calls nothing of the model.

    allowed: the timesteps that are drawn. micro_batch, samples: at most so many in a draw, and of all ranks. state:
    goes on from there.
    """
    for p in work.parameters.values():
        p.grad = None
    damage, size = Damage(work), min(micro_batch, SAMPLES_OF_A_DRAW)
    rank, ranks = work.sharing
    seen, done, most = 0, 0, max(1, -(-samples // size))
    before = state.so_far("damage")
    if before is not None:
        if "values" in before:
            return None if before["values"] is None else before["values"].numpy()
        seen, done = before["samples"], before["done"]
        damage.restore(before["sum"])
        work.batches.pass_over([size] * done)
    shown = work.progress and rank_and_count()[0] == 0
    for k in bar(range(done, most), desc="damage", show=shown, initial=done, total=most, unit="draw"):
        batch, t, noise = work.draw(k, size, allowed)
        if k % ranks == rank:
            damage.add(k, partial(work.mean_loss, batch, t, noise, (DRAWN_BY_LOSS, 1, k)))
        seen += count(batch)
        if state.wanted and damage.seen and (k + 1) % CHECK_EVERY == 0:
            state.note("damage", samples=seen, done=k + 1, sum=damage.total())
    work.check_losses()
    values = damage.mean(seen)
    state.note("damage", now=True, values=None if values is None else torch.from_numpy(values))
    return values
