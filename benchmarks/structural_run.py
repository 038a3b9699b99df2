"""One structural pruning in a process of its own, gradients given: seconds per stage and peak memory, as JSON.

python benchmarks/structural_run.py (diffprune_fast | proved | torch_pruning) (cifar | sd15)

"proved" is diffprune_fast with ``proof=True``, the default: a real forward of the sliced and of the masked dense model,
which the others don't have.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import unet_configs
from torch import nn

RATIO = 0.3


def resident(key: str) -> int:
    """Bytes of ``VmRSS`` or ``VmHWM`` (its peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def give_gradients(model: nn.Module) -> None:
    torch.manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn_like(p)


def with_diffprune_fast(model: nn.Module, name: str, proof: bool = False) -> dict[str, float]:
    import diffprune_fast as dpf
    from diffprune_fast import ops
    from diffprune_fast.scoring.tables import unit_table

    begin = time.perf_counter()
    plan = dpf.trace(model)
    traced = time.perf_counter()
    table = unit_table(plan)
    parameters = dict(model.named_parameters())
    thetas = [parameters[n].detach() for n in table.names]
    grads = [parameters[n].grad for n in table.names]
    scores = ops.channel_scores_(torch.zeros(plan.n_units, dtype=torch.float64), thetas, grads, table.table)  # type: ignore[arg-type]
    del thetas, grads, parameters
    selection = dpf.select(plan, scores.numpy(), ratio=RATIO)
    selected = time.perf_counter()
    dpf.prune(model, plan, selection.keep, proof=proof)
    return {"graph": traced - begin, "select": selected - traced, "slice": time.perf_counter() - selected}


def with_torch_pruning(model: nn.Module, name: str) -> dict[str, float]:
    import torch_pruning as tp

    begin = time.perf_counter()
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=unet_configs.example_inputs(name),
        importance=tp.importance.GroupTaylorImportance(),
        pruning_ratio=RATIO,
        ignored_layers=[model.conv_out],
    )
    built = time.perf_counter()
    groups = list(pruner.step(interactive=True))
    listed = time.perf_counter()
    for group in groups:
        group.prune()
    for module in model.modules():  # what Torch-Pruning leaves to its user
        if type(module).__name__ in ("Downsample2D", "Upsample2D") and module.conv is not None:
            module.channels = module.conv.in_channels
    return {"graph": built - begin, "select": listed - built, "slice": time.perf_counter() - listed}


def main() -> None:
    provider, name = sys.argv[1:]
    model = unet_configs.build(name).eval()
    give_gradients(model)
    inputs = unet_configs.example_inputs(name)
    prune = {
        "diffprune_fast": with_diffprune_fast,
        "proved": partial(with_diffprune_fast, proof=True),
        "torch_pruning": with_torch_pruning,
    }[provider]
    # what any pruning has to import is not part of the work
    import torch_pruning

    import diffprune_fast.checkpoint
    import diffprune_fast.slicing
    import diffprune_fast.tracing

    del torch_pruning, diffprune_fast
    gc.collect()  # nor what the imports have left
    tensors = [t for p in model.parameters() for t in (p, p.grad)]
    sizes = [t.numel() * t.element_size() for t in tensors if t is not None]
    params = sum(p.numel() for p in model.parameters())
    del tensors
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = resident("VmRSS")
    stages = prune(model, name)
    peak = resident("VmHWM")
    with torch.no_grad():
        runs = bool(torch.isfinite(model(**inputs).sample).all())
    result: dict[str, Any] = {
        "seconds": stages,
        "peak_extra": peak - before,
        "largest": max(sizes),
        "params_before": params,
        "params_after": sum(p.numel() for p in model.parameters()),
        "runs": runs,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
