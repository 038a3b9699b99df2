"""A scoring step (forward, backward, channel_scores): eager and in a CUDA graph; ``--part compiled``: torch.compile's.

The step is the package's own, from ``Work.losses`` to ``MicroScores.add``: objective, hooks, buckets and the flags for
what isn't finite. What the scores cost is the difference to the same step without them.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import gpu_timing
import torch
from end_to_end import unet
from gpu_timing import Step, spread
from torch import nn

import diffprune_fast
from diffprune_fast.objective import make_objective
from diffprune_fast.ops.channel_scores import channel_scores_
from diffprune_fast.scoring.estimators import MicroScores, Work
from diffprune_fast.scoring.tables import unit_table

BATCH = 32


class ScoringStep:
    """One micro-batch of the "micro" estimator, without its loader."""

    def __init__(self, step: Step, model: nn.Module, size: int, name: str, compiled: str = "", **options: Any) -> None:
        plan = diffprune_fast.trace(model)
        model = copy.deepcopy(model).to(step.device).eval()
        self.parameters = dict(model.named_parameters())
        units = unit_table(plan)
        batch = 2 if step.rehearsal else BATCH
        self.inputs = (
            torch.randn(batch, 3, size, size, device=step.device),
            torch.randint(0, 1000, (batch,), device=step.device),
            torch.randn(batch, 3, size, size, device=step.device),
        )
        objective = make_objective(model).on(step.device)
        if compiled:
            model.compile(backend=compiled)  # in place: its signature and its config are still there to be read
        autocast = torch.bfloat16 if name == "bf16" else None
        self.work = Work(
            model=model,
            plan=plan,
            objective=objective,
            batches=None,  # type: ignore[arg-type]
            parameters=self.parameters,
            device=step.device,
            seed=0,
            autocast=autocast,
        )
        self.collector = MicroScores(self.work, units, "abs", **options)
        thetas = {n: p.detach() for n, p in self.parameters.items()}
        self.thetas = [thetas[n] for n in units.names]
        self.grads = [torch.randn_like(t) for t in self.thetas]
        self.scores, self.table = self.work.new_scores(), units.table

    def gradients(self) -> None:
        for p in self.parameters.values():
            p.grad = None
        self.work.mean_loss(*self.inputs).backward()

    def score(self) -> None:
        channel_scores_(self.scores, self.thetas, self.grads, self.table)

    def gradients_only(self) -> Callable[[Any], None]:
        return lambda _: self.gradients()

    def score_only(self) -> Callable[[Any], None]:
        return lambda _: self.score()

    def both(self, _: Any = None) -> None:
        self.collector.add(0, partial(self.work.mean_loss, *self.inputs))

    def captured(self) -> Callable[[Any], None]:
        """The whole step as one CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.both()
        torch.cuda.current_stream().wait_stream(stream)
        self.collector.halves()
        self.work.check_losses()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.both()
        # the graph reads this step's model, tables and pinned addresses: they live as long as it can be replayed
        return lambda _, keep=self: graph.replay()


def measure(step: Step, model: nn.Module, size: int, name: str) -> None:
    labels = {"operation": "scoring step", "model": "cifar", "dtype": name}
    found: dict[str, float] = {}

    def row(provider: str, make: Callable[[], Callable[[Any], Any]]) -> None:
        with step.attempt(**labels, provider=provider):
            times = spread(step.milliseconds(make()))
            found[provider] = times["ms"]
            both, alone = found.get("with scores"), found.get("gradients only")
            extra: dict[str, float] = {}
            if both:
                extra["ratio"] = both / times["ms"]
            if both and provider == "scores alone":
                extra["share"] = times["ms"] / both
            if both and alone and provider == "with scores":
                extra["share"] = (both - alone) / both
            step.row(**labels, provider=provider, **times, **extra)

    def fresh(compiled: str = "") -> ScoringStep:
        return ScoringStep(step, model, size, name, compiled)

    if step.part == "compiled":
        row("with scores", lambda: fresh().both)
        row("torch.compile", lambda: fresh("eager" if step.rehearsal else "inductor").both)
        return
    row("gradients only", lambda: fresh().gradients_only())
    row("with scores", lambda: fresh().both)
    row("scores alone", lambda: fresh().score_only())
    if step.device.type == "cuda":
        row("CUDA graph", lambda: fresh().captured())


def main() -> None:
    step = Step("scoring step, compiled" if "compiled" in sys.argv else "scoring step", __doc__.splitlines()[0])
    model = unet(step, "cifar")
    for name in ("tf32", "bf16"):
        measure(step, model, 8 if step.rehearsal else 32, name)


if __name__ == "__main__":
    assert gpu_timing.ROOT.is_dir()
    main()
