"""Step 7: a scoring step (forward, backward, channel_scores) eager, compiled and in a CUDA graph.

The step is the package's own, from ``Work.losses`` to ``MicroScores.add``: objective, hooks, buckets and the flags for
what isn't finite. What the scores cost is the difference to the same step without them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import gpu_timing
import torch
from end_to_end import unet
from gpu_timing import Step, reason, spread
from torch import nn

import diffprune_fast
from diffprune_fast.objective import make_objective
from diffprune_fast.ops.channel_scores import channel_scores_
from diffprune_fast.scoring.estimators import MicroScores, Work
from diffprune_fast.scoring.tables import unit_table

BATCH = 32


class ScoringStep:
    """One micro-batch of the "micro" estimator, without its loader."""

    def __init__(self, step: Step, model: nn.Module, size: int, name: str, compiled: str = "") -> None:
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
        self.collector = MicroScores(self.work, units, "abs")
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
    plain = ScoringStep(step, model, size, name)
    alone = spread(step.milliseconds(lambda _: plain.gradients()))
    for p in plain.parameters.values():
        p.grad = None
    step.row(**labels, provider="gradients only", **alone)
    both = spread(step.milliseconds(plain.both))
    step.row(**labels, provider="with scores", **both, share=(both["ms"] - alone["ms"]) / both["ms"])
    scores = spread(step.milliseconds(lambda _: plain.score()))
    step.row(**labels, provider="scores alone", **scores, share=scores["ms"] / both["ms"])

    def compiled() -> Callable[[Any], None]:
        return ScoringStep(step, model, size, name, "eager" if step.rehearsal else "inductor").both

    variants: dict[str, Callable[[], Callable[[Any], None]]] = {"torch.compile": compiled}
    if step.device.type == "cuda":
        variants["CUDA graph"] = lambda: ScoringStep(step, model, size, name).captured()
    for provider, make in variants.items():
        try:
            times = spread(step.milliseconds(make()))
            step.row(**labels, provider=provider, **times, ratio=both["ms"] / times["ms"])
        except Exception as problem:
            step.failed(**labels, provider=provider, problem=reason(problem))


def main() -> None:
    step = Step("scoring step", __doc__.splitlines()[0])
    model = unet(step, "cifar")
    for name in ("tf32", "bf16"):
        measure(step, model, 8 if step.rehearsal else 32, name)


if __name__ == "__main__":
    assert gpu_timing.ROOT.is_dir()
    main()
