"""What scoring and compensation cost on several ranks: passes, bytes summed over ranks, bytes of state.

``python benchmarks/scale.py`` runs a small UNet on one and on two gloo ranks, and sharded over two, and writes
``results/scale.json``.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

import diffprune_fast as dpf
from diffprune_fast.compensation import compensate
from diffprune_fast.plan.keep_sets import sliced_shapes
from diffprune_fast.scoring.score import score

RESULTS = Path(__file__).parent / "results" / "scale.json"
SCORED, MICRO = 128, 8


def model() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    ).eval()


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(32, 3, 16, 16, generator=generator) * 2 - 1 for _ in range(4)]


class Counted:
    """Samples that pass forward and backward through a model, and bytes that are summed over the ranks."""

    def __init__(self, *models: torch.nn.Module) -> None:
        self.found: Counter[str] = Counter()
        self._handles = [m.register_forward_hook(self._passed) for m in models]
        self._reduce = torch.distributed.all_reduce

    def _passed(self, _: Any, args: Any, output: Any) -> None:
        y = output.sample
        self.found["forward"] += len(y)
        if y.requires_grad:
            y.register_hook(lambda g: self.found.update({"backward": len(g)}))

    def __enter__(self) -> Counter[str]:
        def counted(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.found["reduced bytes"] += x.nbytes
            self.found["reductions"] += 1
            return self._reduce(x, *args, **kwargs)

        torch.distributed.all_reduce = counted
        return self.found

    def __exit__(self, *_: object) -> None:
        torch.distributed.all_reduce = self._reduce
        for handle in self._handles:
            handle.remove()


def scored(dense: UNet2DModel, plan: dpf.Plan, path: str | None) -> tuple[Any, dict[str, int]]:
    """The scores, and what was counted."""
    with Counted(dense) as found:
        scores = score(
            dense,
            images(),
            plan,
            scheduler=DDPMScheduler(),
            micro_batch=MICRO,
            max_samples=SCORED,
            agreement=1.0,
            checkpoint=path,
            progress=False,
        )
    return scores, dict(found)


def measure_sharded() -> dict[str, Any]:
    """Of a model that is spread over the ranks."""
    from torch.distributed.fsdp import fully_shard

    torch.distributed.device_mesh.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    dense: Any = model()
    for block in [*dense.down_blocks, dense.mid_block, *dense.up_blocks]:
        fully_shard(block)
    fully_shard(dense)
    held = sum(p.to_local().numel() for p in dense.parameters())
    scores, scoring = scored(dense, dpf.trace(dense), None)
    return {"samples": {"scores": scores.samples}, "parameters held": held, "scoring": scoring}


def measure(folder: str) -> dict[str, Any]:
    dense, loader, scheduler = model(), images(), DDPMScheduler()
    plan = dpf.trace(dense)
    path = f"{folder}/state"
    scores, scoring = scored(dense, plan, path)
    sliced = dpf.score_and_prune(
        dense, None, criterion="magnitude", ratio=0.3, compensate=False, inplace=False, progress=False
    )
    kept = sliced_shapes(dense, sliced.plan, sliced.keep).kept
    with Counted(dense, sliced.model) as solving:
        done = compensate(sliced.model, dense, loader, kept=kept, scheduler=scheduler, mode="full", progress=False)
    widths = [dict(sliced.model.named_modules())[n].weight[0].numel() for n in done.layers if _has_matrix(sliced, n)]
    return {
        "units": plan.n_units,
        "parameters": sum(p.numel() for p in dense.parameters()),
        "samples": {"scores": scores.samples, "compensation": done.samples},
        "scoring": scoring,
        "compensation": dict(solving),
        "state bytes": os.path.getsize(path) if os.path.exists(path) else None,
        "solved layers": len(done.layers),
        "sum of squared widths": sum(w * w for w in widths),
        "compensation's extra bytes": done.bytes,
    }


def _has_matrix(result: Any, name: str) -> bool:
    return dict(result.model.named_modules())[name].weight.ndim > 1


def rank_main(rank: int, ranks: int, folder: str, sharded: bool) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    found = measure_sharded() if sharded else measure(folder)
    Path(f"{folder}/{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def main() -> None:
    import torch.multiprocessing as mp

    results = {}
    for name, ranks, sharded in (("1 ranks", 1, False), ("2 ranks", 2, False), ("2 ranks, sharded", 2, True)):
        with tempfile.TemporaryDirectory() as folder:
            how = os.environ.get("START", "spawn")
            mp.start_processes(rank_main, (ranks, folder, sharded), nprocs=ranks, start_method=how)
            results[name] = [json.loads(Path(f"{folder}/{r}.json").read_text()) for r in range(ranks)]
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
