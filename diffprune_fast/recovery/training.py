"""The loop: loss, gradients, clipping, step, average; on one process or on all that accelerate launched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ..checkpoint.state import read_state, write_state
from ..objective.batches import count, part
from ..objective.image_range import check_range_by_loss
from ..objective.isolation import unwrapped
from ..objective.loss import Objective
from ..objective.loss_run import precision
from ..objective.nested import map_tensors, moved
from ..objective.randomness import NOISE, TIMESTEPS, Stream, generator_for, stratified
from ..objective.ranks import compare_batch, reduced
from ..objective.shards import fsdp_modules, spread_like, whole
from .distillation import StepLoss
from .position import Position
from .progress import Progress

if TYPE_CHECKING:
    from accelerate import Accelerator

# The place of a process's dropout in the seed's tree.
DROPOUT = 31


class Step(nn.Module):
    """A step's loss as a module's forward, which DistributedDataParallel can wrap, whatever the loss calls."""

    def __init__(self, model: nn.Module, loss: StepLoss, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.model = model
        self._loss = (loss,)  # in a tuple: a loss that is a module itself brings no parameters of its own to train
        self._autocast = autocast

    def forward(self, batch: Any, t: Tensor, noise: Tensor) -> Tensor:
        with precision(t.device, self._autocast):
            return self._loss[0](self.model, batch, t, noise)


@dataclass(frozen=True)
class Settings:
    """How many steps of how many batches each, the gradient's largest norm, and the seed of everything."""

    steps: int
    clip: float
    accumulate: int
    seed: int


@dataclass
class Training:
    """A training that can be stopped and gone on with. losses: of the steps so far.

    A batch is shared out among the processes, so the losses are those of one process, whatever their number; timesteps
    and noise are drawn for the whole of it.
    """

    model: nn.Module
    parameters: list[nn.Parameter]
    step_loss: nn.Module
    objective: Objective
    optimizer: Any
    rate: Any
    average: EMAModel
    position: Position
    accelerator: Accelerator
    settings: Settings
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        draws = generator_for(self.settings.seed, DROPOUT, self.accelerator.process_index)
        self._begun = False
        self._dropout = Stream(int(torch.randint(2**31, (), generator=draws)))

    def run(self, progress: Progress, checkpoint: Path | None, every: int, about: Mapping[str, Any]) -> None:
        """All steps that are left; the model ends with the average of its weights. about: beside the state, on disk."""
        with progress:
            while (n := len(self.losses)) < self.settings.steps:
                lr = self.rate.get_last_lr()[0]
                loss, norm = self._step(n)
                self.accelerator.log({"loss": loss, "gradient norm": norm, "lr": lr}, step=n)
                progress.step(loss)
                if checkpoint is not None and ((n + 1) % every == 0 or n + 1 == self.settings.steps):
                    self.save(checkpoint, about)
        self.average.copy_to(self.parameters)

    def _step(self, n: int) -> tuple[float, float]:
        """Step ``n``: its loss, and the norm of its gradients before clipping."""
        parts = self.settings.accumulate
        total = torch.zeros((), dtype=torch.float64)
        for i in range(parts):
            last = i + 1 == parts
            with nullcontext() if last else self._apart():
                value, share = self._loss(n * parts + i)
                total += value.detach().cpu().double() * share / parts
                if last and self.accelerator.num_processes > 1:
                    # Backward exchanges gradients, where nobody looks for news of a process that raised: all come here.
                    total = reduced(total.to(self.device))
                # Gradients are averaged over the processes.
                self.accelerator.backward(value * share * self.accelerator.num_processes / parts)
        norm = whole(self.accelerator.clip_grad_norm_(self.parameters, self.settings.clip))
        loss = self._finite(float(total), float(norm), n)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.rate.step()
        self.average.step(self.parameters)
        self.losses.append(loss)
        return loss, float(norm)

    def _loss(self, k: int) -> tuple[Tensor, float]:
        """The loss of this process's part of batch ``k``, and its share of that."""
        batch = next(self.position)
        if not self._begun:
            compare_batch(batch)
            check_range_by_loss(unwrapped(self.model), self.objective, batch)
            self._begun = True
        rank, ranks, n = self.accelerator.process_index, self.accelerator.num_processes, count(batch)
        if n < ranks:
            raise ValueError(f"the loader yields batches of {n}, which {ranks} processes share: give larger ones")
        rows = slice(rank * n // ranks, (rank + 1) * n // ranks)
        seed, device = self.settings.seed, self.device
        t = stratified(np.arange(self.objective.n_timesteps), n, generator_for(seed, TIMESTEPS, k))[rows].to(device)
        noise = self.objective.noise(batch, generator_for(seed, NOISE, k))[rows].to(device)
        mine = moved(part(batch, rows.start, rows.stop) if ranks > 1 else batch, device)
        reduced(torch.zeros((), device=device))  # the forward may exchange buffers, where nobody looks for news
        with self._dropout:
            value = self.step_loss(mine, t, noise)
        return value, (rows.stop - rows.start) / n

    def _apart(self) -> AbstractContextManager[Any]:
        """Gradients stay with this process: others are yet to be added."""
        return self.accelerator.no_sync(self.step_loss)

    def _finite(self, loss: float, norm: float, step: int) -> float:
        """Raises FloatingPointError; half precision's scaler looks after infinite gradients itself."""
        if not (math.isfinite(loss) and (math.isfinite(norm) or self.accelerator.scaler is not None)):
            raise FloatingPointError(
                f"the loss is {loss} and its gradient's norm {norm} at step {step}: look for NaN in the weights or "
                "images, or lower lr"
            )
        return loss

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    def save(self, path: Path, about: Mapping[str, Any]) -> None:
        """Write everything that the rest of the training depends on; the first process writes, of a sharded model the
        whole tensors, which come to it one after the other."""
        dropout = self._dropout.states
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            dropouts = gather_object([dropout])
        else:
            dropouts = [dropout]
        sharded = [x.state_dict() for x in (self.model, self.optimizer, self.average)]
        model, optimizer, average = (self._gathered(x) for x in sharded)
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "settings": dict(about),
                "losses": torch.tensor(self.losses, dtype=torch.float64),
                "model": model,
                "optimizer": optimizer,
                "rate": self.rate.state_dict(),
                "average": average,
                "position": self.position.state(),
                "dropout": dropouts,
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            write_state(path, state)

    def load(self, path: Path, about: Mapping[str, Any]) -> int:
        """Go on from what :meth:`save` wrote; gives the steps that are done, 0 where there is no file.

        Raises ValueError for the state of another training or model.
        """
        state = read_state(path, about)
        if state is None:
            return 0
        mine, theirs = ({n: tuple(x.shape) for n, x in s.items()} for s in (self.model.state_dict(), state["model"]))
        if mine != theirs:
            other = sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))[0]
            raise ValueError(
                f"{path} is of another model: {other} is {theirs.get(other)} there, {mine.get(other)} here. Remove the "
                "file to begin anew"
            )
        self._spread(state)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rate.load_state_dict(state["rate"])
        self.average.load_state_dict(state["average"])
        self.average.to(self.device)
        self.losses = state["losses"].tolist()
        if len(state["dropout"]) == self.accelerator.num_processes:  # another number draws other dropout
            self._dropout.states = state["dropout"][self.accelerator.process_index]
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if len(self.losses) < self.settings.steps:
            self.position.go_to(state["position"])
        return len(self.losses)

    def _gathered(self, state: Any) -> Any:
        """Tensors of shards as whole ones, in the first process's memory; the others only send theirs."""
        if not fsdp_modules(self.model):
            return state
        keeps = self.accelerator.is_main_process

        def gather(x: Tensor) -> Tensor:
            full = whole(x)
            return full.cpu() if keeps else x

        return map_tensors(state, gather)

    def _spread(self, state: dict[str, Any]) -> None:
        """The whole tensors of a state as the model's are: each process takes its part."""
        now = self.model.state_dict()
        state["model"] = {name: spread_like(x, now[name]) for name, x in state["model"].items()}
        moments = state["optimizer"]["state"]
        for i, p in enumerate(self.parameters):
            if i in moments:
                moments[i] = {k: spread_like(x, p) if x.shape == p.shape else x for k, x in moments[i].items()}
        average = state["average"]
        average["shadow_params"] = [spread_like(x, p) for x, p in zip(average["shadow_params"], self.parameters)]
