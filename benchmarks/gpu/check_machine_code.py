"""Compile the CUDA kernel for every architecture and look at what came out: no spills, 16-byte accesses.

    python benchmarks/gpu/check_machine_code.py [--json FILE]

Needs nvcc and cuobjdump (Triton brings one), no GPU. Refused are register spills (ptxas), local memory in the machine
code, and a kernel that doesn't read by 16 bytes in every one of its unrolled copies, or doesn't write by 16 bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "csrc" / "cuda"), str(ROOT / "benchmarks" / "gpu")]

import build_cuda  # noqa: E402
from compile_ahead import cuobjdump  # noqa: E402

# Reads of a tile: 16 KiB by 256 threads of 16 bytes, unrolled (kStageBytes, kThreads in csrc/cuda/slice_index.h).
READS = 4


def compile_kernel(nvcc: str, folder: Path) -> tuple[Path, dict[str, dict[str, int]]]:
    """The object file, and per architecture what ptxas says of it."""
    target = folder / "slice_channels.o"
    source = ROOT / "csrc" / "cuda" / "slice_channels.cu"
    said = build_cuda.run([nvcc, *build_cuda.nvcc_flags(nvcc), "-c", str(source), "-o", str(target)])
    figures = {}
    pattern = (
        r"for '(sm_\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers.*?(\d+) bytes smem"
    )
    for arch, stack, stores, loads, registers, shared in re.findall(pattern, said, re.DOTALL):
        figures[arch] = {"registers": int(registers), "shared": int(shared), "stack": int(stack)}
        figures[arch] |= {"spills": int(stores) + int(loads)}
    return target, figures


def count_accesses(objects: Path, arch: str) -> dict[str, int]:
    """16-byte reads and writes, and accesses to local memory, in an architecture's machine code."""
    done = subprocess.run(
        [cuobjdump(), "-sass", "-arch", arch, str(objects)], capture_output=True, text=True, check=True
    )
    sass = done.stdout
    wide = r"\.(?:\w+\.)*128"
    return {
        "reads_16": len(re.findall(r"\bLDGSTS" + wide, sass)) + len(re.findall(r"\bLDG" + wide, sass)),
        "writes_16": len(re.findall(r"\bSTG" + wide, sass)),
        "local": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.MULTILINE)),
    }


def problem(figures: dict[str, Any]) -> str | None:
    """What is wrong with an architecture's code, or None."""
    if figures["spills"] or figures["stack"] or figures["local"]:
        return "spills registers"
    if figures["reads_16"] < READS:
        return f"reads by 16 bytes in {figures['reads_16']} of {READS} places"
    return None if figures["writes_16"] else "doesn't write by 16 bytes"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--nvcc", default=shutil.which("nvcc"))
    args = parser.parse_args()
    if args.nvcc is None:
        raise SystemExit("nvcc is not on PATH: --nvcc names it")
    with tempfile.TemporaryDirectory() as folder:
        objects, found = compile_kernel(args.nvcc, Path(folder))
        for arch, figures in found.items():
            figures |= count_accesses(objects, arch)
    if not found:
        raise SystemExit("ptxas reported no kernel: has its output changed?")
    wrong = 0
    for arch in sorted(found, key=lambda a: int(a[3:])):
        reason = problem(found[arch])
        wrong += reason is not None
        line = " ".join(f"{k}={v}" for k, v in found[arch].items())
        print(f"slice_channels {arch:<7} {line}{'  <-- ' + reason if reason else ''}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
