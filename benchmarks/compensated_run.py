"""One whole ``score_and_prune`` with compensation, in a process of its own: seconds by stage, memory, losses, as JSON.

    python benchmarks/compensated_run.py digits                  # examples/digits' model, its images
    python benchmarks/compensated_run.py cifar --threads 2   # google/ddpm-cifar10-32's size, random weights

A model with random weights has no redundancy, so the losses of ``cifar`` say nothing; its seconds and bytes do.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import unet_configs
from diffusers import DDPMScheduler, UNet2DModel
from measured import DIGITS
from structural_run import resident

SAMPLES = 2048  # that scores rest on


def digits() -> tuple[Any, Any, Any]:
    sys.path.insert(0, str(DIGITS.parent))
    from digits.data import digits as images

    model = UNet2DModel.from_pretrained(DIGITS / "model", torch_dtype=torch.float32).eval()
    scheduler = DDPMScheduler.from_pretrained(DIGITS / "model")
    return model, scheduler, images()[0].images.split(64)


def cifar() -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    images = torch.rand(512, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return unet_configs.build("cifar").eval(), DDPMScheduler(), images.split(32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["digits", "cifar"])
    parser.add_argument("--threads", type=int, help="instead of PyTorch's own number")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="that scores rest on, at most")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    from diffprune_fast import score_and_prune

    model, scheduler, loader = {"digits": digits, "cifar": cifar}[args.model]()
    before = {"params": sum(p.numel() for p in model.parameters()), "resident": resident("VmRSS")}
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    begin, cpu = time.perf_counter(), time.process_time()
    result = score_and_prune(model, loader, scheduler=scheduler, macs=0.5, max_samples=args.samples, progress=False)
    whole = {"all": time.perf_counter() - begin, "all, CPU time": time.process_time() - cpu}
    found = {
        "model": args.model,
        "threads": torch.get_num_threads(),
        "samples": args.samples,
        "seconds": {name: round(s, 2) for name, s in {**result.seconds, **whole}.items()},
        "peak_extra": resident("VmHWM") - before["resident"],
        "params_before": before["params"],
        "params_after": result.after.params,
        "compensation": str(result.compensation),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
