"""What removing a whole residual block would cost."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..choices import BlockMethod, check_choice
from ..objective.batches import Batches, count
from ..objective.checks import check_batch, check_weights
from ..objective.isolation import stand_ins, unwrapped
from ..objective.loss import LossFunction, make_objective
from ..objective.loss_run import LossRun
from ..objective.randomness import own_randomness
from ..plan.blocks import Block, Returns
from ..progress import bar
from ..scoring.checks import AUTOCAST, check_timesteps
from ..scoring.estimators import CHECK_EVERY
from ..scoring.score import counted_timesteps
from ..scoring.scores import BlockScores
from .find_blocks import find_blocks, passthroughs_for


def score_blocks(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    scheduler: Any = None,
    method: BlockMethod = "first-order",
    samples: int = 512,
    micro_batch: int = 32,
    threshold: float | None = 0.05,
    timesteps: Sequence[int] | None = None,
    loss_fn: LossFunction | None = None,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
    seed: int = 0,
    autocast: str | torch.dtype | None = None,
    progress: bool = True,
) -> BlockScores:
    """What removing each residual block would cost the training loss. The model is as before when this ends.

    method ``"first-order"``: the mean over micro-batches of ``abs(sum((out - in) * dL/d(out)))``, the first-order
    change of the loss when a block's output becomes its input. One backward through the activations serves all blocks;
    no weight gets a gradient. The absolute value is taken in every micro-batch, as for channels: over all data the sum
    is near zero in a trained model, whose loss doesn't change to first order with the scale of a branch.
    method ``"loss"``: the rise itself, measured on the same samples, a forward per block.

    Args:
        model, loader, scheduler, loss_fn, timesteps, seed, autocast, progress: as for :func:`score`.
        method: ``"first-order"`` or ``"loss"``.
        samples: samples that the costs rest on.
        micro_batch: samples of one pass.
        threshold: as for :func:`score`; None counts all timesteps.
        example_inputs: as for :func:`trace`.

    Returns:
        One cost per block, ``(n_blocks,)``; printing it gives a table, the cheapest first.

    Raises:
        ValueError: the model has no such block, or what :func:`score` and :func:`find_blocks` raise it for.
        TypeError, FloatingPointError, TraceError: as those two.

    Example:
        >>> from diffusers import UNet2DModel
        >>> unet = UNet2DModel(8, block_out_channels=(8,), down_block_types=("DownBlock2D",),
        ...                    up_block_types=("UpBlock2D",), norm_num_groups=4, add_attention=False)
        >>> scores = score_blocks(unet, [torch.rand(8, 3, 8, 8) * 2 - 1], samples=16, progress=False)
        >>> len(scores.costs), len(scores.cheapest(1))
        (6, 1)

    Source: the expansion is that of Molchanov et al., "Importance Estimation for Neural Network Pruning" (CVPR 2019),
    with one factor on a whole branch in place of one on a channel.
    """
    begin = time.perf_counter()
    check_choice("method", method, BlockMethod)
    if autocast not in AUTOCAST:
        raise ValueError(f"autocast is None or 'bf16', not {autocast!r}")
    if micro_batch < 1 or samples < 1:
        raise ValueError(f"samples={samples}, micro_batch={micro_batch}: both are at least 1")
    if loader is None:
        raise ValueError("blocks are scored by the loss: give a loader of images")
    model = unwrapped(model)
    device = check_weights(model)
    objective = make_objective(model, scheduler, loss_fn).on(device)
    asked = None if timesteps is None else check_timesteps(timesteps, objective.n_timesteps)
    blocks = find_blocks(model, example_inputs)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no residual block that could be left out")
    with own_randomness(seed, loader), torch.inference_mode(False), torch.enable_grad():
        batches = Batches(loader, lambda batch: check_batch(model, batch, loss_fn))
        with stand_ins(model, ()):
            work = LossRun(
                model=model,
                objective=objective,
                batches=batches,
                device=device,
                seed=seed,
                autocast=AUTOCAST[autocast],
                progress=progress,
            )
            allowed = counted_timesteps(work, threshold)[1] if asked is None else asked
            measure = _FirstOrder(work, blocks) if method == "first-order" else _Loss(work, blocks)
            rows, taken = _walked_through(work, measure, allowed, samples, micro_batch)
    costs = rows.mean(0)
    if not np.isfinite(costs).all():
        bad = blocks[int(np.flatnonzero(~np.isfinite(costs))[0])].name
        raise FloatingPointError(f"the gradient at the output of {bad} is NaN or infinite: try autocast='bf16'")
    seconds = time.perf_counter() - begin
    return BlockScores(blocks, costs, method, taken, seed, seconds, _agreement(rows))


def _walked_through(
    work: LossRun, measure: Any, allowed: np.ndarray, samples: int, micro_batch: int
) -> tuple[np.ndarray, int]:
    """``(n micro-batches, n_blocks)`` costs, and the samples used."""
    rows: list[Tensor] = []
    taken = 0
    with measure, bar(desc="scoring blocks", show=work.progress, total=samples, unit="sample") as shown:
        while taken < samples:
            batch, t, noise = work.draw(len(rows), min(micro_batch, samples - taken), allowed)
            rows.append(measure.of(batch, t, noise))
            taken += count(batch)
            if len(rows) % CHECK_EVERY == 0 or taken >= samples:
                work.check_losses()
            shown.update(count(batch))
    return torch.stack(rows).double().cpu().numpy(), taken


class _FirstOrder(ExitStack):
    """Hooks that multiply what each block adds to its inputs with the gradient that comes back."""

    def __init__(self, work: LossRun, blocks: Sequence[Block]) -> None:
        super().__init__()
        self._work, self._blocks = work, blocks
        self._sums = torch.zeros(len(blocks), dtype=work.sum_dtype, device=work.device)

    def __enter__(self) -> _FirstOrder:
        for i, block in enumerate(self._blocks):
            module = self._work.model.get_submodule(block.name)
            arguments = tuple(inspect.signature(module.forward).parameters)

            def hook(_: Any, args: Any, kwargs: Any, out: Any, i: int = i, arguments: Any = arguments) -> Any:
                return self._watched(i, out, self._blocks[i].returns, {**dict(zip(arguments, args)), **kwargs})

            self.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        return self

    def of(self, batch: Any, t: Tensor, noise: Tensor) -> Tensor:
        self._sums.zero_()
        self._work.mean_loss(batch, t, noise).backward()
        return self._sums.abs()

    def _watched(self, i: int, out: Any, returns: Returns, given: Mapping[str, Any]) -> Any:
        if isinstance(out, (tuple, list)) and isinstance(returns, list):
            return type(out)([self._watched(i, x, r, given) for x, r in zip(out, returns)])
        if not isinstance(out, Tensor) or not isinstance(returns, str):
            return out
        if not out.requires_grad:  # nothing before it does: the gradient need not go further back
            out = out.detach().requires_grad_().clone()
        added = out.detach() - given[returns].detach()

        def add(gradient: Tensor) -> None:
            self._sums[i] += (added * gradient).sum(dtype=self._sums.dtype)

        out.register_hook(add)
        return out


class _Loss(ExitStack):
    """The loss without each block, less the loss with it."""

    def __init__(self, work: LossRun, blocks: Sequence[Block]) -> None:
        super().__init__()
        self._work, self._blocks = work, blocks

    @torch.no_grad()
    def of(self, batch: Any, t: Tensor, noise: Tensor) -> Tensor:
        with_it = self._work.mean_loss(batch, t, noise)
        rises = []
        for block in self._blocks:
            with passthroughs_for(self._work.model, {block.name: block.returns}):
                rises.append(self._work.mean_loss(batch, t, noise) - with_it)
        return torch.stack(rises)


def _agreement(rows: np.ndarray) -> float | None:
    if rows.shape[0] < 2 or rows.shape[1] < 3:
        return None
    from scipy.stats import rankdata  # 0.3 s, which who drops no blocks is spared

    ranks = [rankdata(rows[half::2].mean(0)) for half in (0, 1)]
    return float(np.corrcoef(ranks)[0, 1]) if all(r.std() > 0 for r in ranks) else None
