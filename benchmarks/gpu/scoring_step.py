"""Step 7: a scoring step (forward, backward, channel_scores) eager, compiled and in a CUDA graph.

What the scores cost is the difference to the same step without them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import gpu_timing
import torch
from end_to_end import precision, unet
from gpu_timing import Step, reason, spread
from torch import nn

import diffprune_fast
from diffprune_fast.ops import channel_scores_
from diffprune_fast.scoring.tables import unit_table

BATCH = 32


class ScoringStep:
    """One micro-batch of the "micro" estimator, without its loader."""

    def __init__(self, step: Step, model: nn.Module, size: int, name: str, compiled: str = "") -> None:
        self.step, self.name = step, name
        plan = diffprune_fast.trace(model)
        self.model = copy.deepcopy(model).to(step.device)
        self.forward = torch.compile(self.model, backend=compiled) if compiled else self.model
        self.units = unit_table(plan)
        parameters = dict(self.model.named_parameters())
        self.parameters = [parameters[n] for n in self.units.names]
        batch = 2 if step.rehearsal else BATCH
        self.images = torch.randn(batch, 3, size, size, device=step.device)
        self.noise = torch.randn_like(self.images)
        self.t = torch.randint(0, 1000, (batch,), device=step.device)
        self.scores = torch.zeros(plan.n_units, dtype=torch.float64, device=step.device)

    def gradients(self) -> None:
        self.model.zero_grad(set_to_none=True)
        with precision(self.step, self.name):
            loss = torch.nn.functional.mse_loss(self.forward(self.images, self.t).sample.float(), self.noise)
        loss.backward()

    def score(self) -> None:
        thetas, grads = [p.detach() for p in self.parameters], [p.grad for p in self.parameters]
        channel_scores_(self.scores, thetas, grads, self.units.table)  # type: ignore[arg-type]

    def both(self, _: Any = None) -> None:
        self.gradients()
        self.score()

    def captured(self) -> Callable[[Any], None]:
        """The whole step as one CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.both()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.both()
        return lambda _: graph.replay()


def measure(step: Step, model: nn.Module, size: int, name: str) -> None:
    labels = {"operation": "scoring step", "model": "cifar", "dtype": name}
    plain = ScoringStep(step, model, size, name)
    alone = spread(step.milliseconds(lambda _: plain.gradients()))
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
