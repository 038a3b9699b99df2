"""What ``diffprune-fast info`` prints: versions, devices, and who can serve which operation."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from . import cpu, dispatch

PACKAGES = ("torch", "diffusers", "numpy", "scipy", "safetensors", "triton")


def info() -> str:
    """Versions, devices, and every backend with "ok" or the reason why it can't serve."""
    from .. import __version__

    lines = [f"diffprune_fast {__version__}", f"Python {platform.python_version()} on {platform.platform()}", ""]
    lines += ["Packages", *(f"  {name:<16} {_version(name)}" for name in PACKAGES), ""]
    lines += ["Devices", *(f"  {line}" for line in _devices()), ""]
    lines.append("Backends")
    for op, table in dispatch.BACKENDS.items():
        lines.append(f"  {op}")
        lines += [f"    {name:<10} {dispatch.availability(op, name)}" for name in table]
    override = os.environ.get(dispatch.ENVIRONMENT)
    lines.append(f"  {dispatch.ENVIRONMENT} = {override}" if override else f"  {dispatch.ENVIRONMENT} is not set")
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    lines = [f"cpu: {_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {cpu.simd()}"]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            lines.append(f"cuda:{i}: {p.name}, {p.total_memory / 2**30:.0f} GiB, compute {p.major}.{p.minor}")
    else:
        built = (
            f"PyTorch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "PyTorch is built without CUDA"
        )
        lines.append(f"cuda: none ({built})")
    return lines


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
