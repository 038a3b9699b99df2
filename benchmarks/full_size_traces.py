"""Seconds and memory of a plan for models of full size, wholly on ``meta``: no weights, no hub.

    python benchmarks/full_size_traces.py [--write benchmarks/results/full_size_traces.md] [NAME ...]

Each model is traced in a process of its own, so that the peak is its own. Configs are those of the published models.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

import diffprune_fast as dpf

Made = tuple[nn.Module, dict[str, Any] | None]


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def sd15() -> Made:
    return diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768), None


def sdxl() -> Made:
    model = diffusers.UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )
    return model, None


def sd3() -> Made:
    model = diffusers.SD3Transformer2DModel(
        sample_size=128,
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=192,
    )
    inputs = {
        "hidden_states": meta(1, 16, 128, 128),
        "encoder_hidden_states": meta(1, 333, 4096),
        "pooled_projections": meta(1, 2048),
        "timestep": torch.ones(1, device="cpu"),
    }
    return model, inputs


def flux() -> Made:
    model = diffusers.FluxTransformer2DModel(guidance_embeds=True)
    inputs = {
        "hidden_states": meta(1, 4096, 64),
        "encoder_hidden_states": meta(1, 512, 4096),
        "pooled_projections": meta(1, 768),
        "timestep": torch.ones(1, device="cpu"),
        "guidance": torch.ones(1, device="cpu"),
        "img_ids": torch.zeros(4096, 3, device="cpu"),
        "txt_ids": torch.zeros(512, 3, device="cpu"),
    }
    return model, inputs


MODELS: dict[str, Callable[[], Made]] = {
    "Stable Diffusion 1.5 UNet": sd15,
    "SDXL UNet": sdxl,
    "SD3 medium transformer": sd3,
    "FLUX.1 transformer": flux,
}


def traced(name: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    with torch.device("meta"):
        model, inputs = MODELS[name]()
    before = _peak()
    begin, cpu = time.perf_counter(), time.process_time()
    plan = dpf.trace(model, inputs)
    return {
        "model": name,
        "params": plan.params(),
        "macs": plan.macs(attention=True),
        "groups": len(plan.groups),
        "units": plan.n_units,
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - cpu,
        "peak_gb": _peak(),
        "peak_before_gb": before,
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def document(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Plans of models of full size",
        "",
        "Written by `python benchmarks/full_size_traces.py --write benchmarks/results/full_size_traces.md`: one "
        "thread, MACs of one forward with attention. *Peak* is the whole process's, with PyTorch and diffusers; the "
        f"second figure is what it had before tracing. PyTorch {torch.__version__}, diffusers {diffusers.__version__}.",
        "",
        "| Model | Parameters | TMACs | Groups | Units | Seconds | CPU seconds | Peak, before tracing |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        lines.append(
            f"| {r['model']} | {r['params'] / 1e9:.2f} G | {r['macs'] / 1e12:.2f} | {r['groups']} | {r['units']} "
            f"| {r['seconds']:.1f} | {r['cpu_seconds']:.1f} | {r['peak_gb']:.2f} GB, {r['peak_before_gb']:.2f} GB |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only models whose names contain one of these")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(traced(args.one)))
        return
    rows = []
    for name in MODELS:
        if not args.names or any(n.lower() in name.lower() for n in args.names):
            command = [sys.executable, __file__, "--one", name]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append(json.loads(out.splitlines()[-1]))
            print(rows[-1], flush=True)
    text = document(rows)
    if args.write:
        args.write.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
