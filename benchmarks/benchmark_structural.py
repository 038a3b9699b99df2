"""The whole structural part, gradients given: trace, score, select, slice. Against Torch-Pruning on the same model.

Each provider works in a process of its own, so that its peak memory is its own. Both prune 30 % of every group; what
is compared before timing is that both pruned models run and that the kept parameters are of one order (the two round
and group differently, so the counts cannot be equal).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import measured
import pytest
import torch
import unet_configs

from diffprune_fast import ops

ROOT = Path(__file__).resolve().parents[1]


def structural(provider: str, model: str) -> dict[str, Any]:
    script = str(ROOT / "benchmarks" / "structural_run.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, provider, model], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


PROVIDERS = ["torch_pruning", "diffprune_fast", "proved"]


@pytest.mark.parametrize(("model", "rounds"), [("cifar", 3), ("sd15", 1)])
def test_structural_part(benchmark, record_stages, model: str, rounds: int) -> None:
    results: list[dict[str, dict[str, Any]]] = []
    benchmark.pedantic(lambda: results.append({p: structural(p, model) for p in PROVIDERS}), rounds=rounds)
    for result in (r for one in results for r in one.values()):
        assert result["runs"]
        assert 0.35 < result["params_after"] / result["params_before"] < 0.75
    record_stages(model, results)


@pytest.mark.parametrize("batch", [32])
def test_share_of_a_scoring_step(compared, batch: int) -> None:
    """One pass over all weights and gradients, against the forward and backward that give them, "step"."""
    torch.manual_seed(0)
    model = unet_configs.build("cifar")
    images, t = torch.randn(batch, 3, 32, 32), torch.randint(0, 1000, (batch,))

    def step() -> None:
        model.zero_grad()
        torch.nn.functional.mse_loss(model(images, t).sample, torch.randn_like(images)).backward()

    step()
    thetas = [p.detach() for p in model.parameters()]
    grads = [p.grad for p in model.parameters()]
    from benchmark_channel_scores import agree, table_of, truth

    table = table_of([t.shape for t in thetas])

    def score() -> torch.Tensor:
        return ops.channel_scores_(torch.zeros(table.n_units, dtype=torch.float64), thetas, grads, table, backend="cpu")

    errors = {"cpu": agree(score(), truth(thetas, grads, None), torch.float32)}
    works = {"cpu": measured.work(score), "step": measured.work(step)}
    label = f"cifar, micro-batch {batch}"
    row = compared("channel_scores in a scoring step", label, works, errors=errors, rounds=5)[0]
    row.notes["share"] = f"{1 / row.over['step']:.2%}"
