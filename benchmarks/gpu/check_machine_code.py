"""Compile the CUDA kernel for every architecture and look at what came out: no spills, few instructions per unit.

    python benchmarks/gpu/check_machine_code.py [--json FILE]

Needs nvcc and cuobjdump (Triton brings one), no GPU. Refused are register spills (ptxas), local memory in the machine
code, and units (what one access moves: 1, 2, 4, 8 or 16 bytes) without a loop that has its loads under way together, or
that takes more instructions for one.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "csrc" / "cuda"), str(ROOT / "benchmarks" / "gpu")]

import build_cuda  # noqa: E402
from compile_ahead import cuobjdump  # noqa: E402

# Loads that a thread has under way together (gather_tile in csrc/cuda/slice_kernel.h).
LOADS = 8
UNITS = {1: ".U8", 2: ".U16", 4: "", 8: ".64", 16: ".128"}
# A load, a store, where both are, and an eighth of the loop's own.
MOST_PER_UNIT = 10


def compile_kernel(nvcc: str, folder: Path) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The object file, and per architecture what ptxas says of it."""
    target = folder / "slice_channels.o"
    source = ROOT / "csrc" / "cuda" / "slice_channels.cu"
    said = build_cuda.run([nvcc, *build_cuda.nvcc_flags(nvcc, strict=True), "-c", str(source), "-o", str(target)])
    figures: dict[str, dict[str, Any]] = {}
    pattern = (
        r"for '(sm_\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers.*?(\d+) bytes smem"
    )
    for arch, stack, stores, loads, registers, shared in re.findall(pattern, said, re.DOTALL):
        figures[arch] = {"registers": int(registers), "shared": int(shared), "stack": int(stack)}
        figures[arch] |= {"spills": int(stores) + int(loads)}
    return target, figures


def machine_code(objects: Path, arch: str) -> list[tuple[int, str]]:
    """Address and words of every instruction."""
    done = subprocess.run(
        [cuobjdump(), "-sass", "-arch", arch, str(objects)], capture_output=True, text=True, check=True
    )
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", done.stdout, re.MULTILINE)
    return [(int(address, 16), words) for address, words in found]


def loops(code: list[tuple[int, str]]) -> Iterator[list[str]]:
    """The instructions of every loop: from where a branch goes back to, to the branch."""
    at = {address: i for i, (address, _) in enumerate(code)}
    for i, (address, words) in enumerate(code):
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", words)
        if target and int(target[1], 16) < address:
            yield [w for _, w in code[at[int(target[1], 16)] : i + 1]]


def per_unit(code: list[tuple[int, str]]) -> dict[int, float]:
    """Instructions per unit of each size, where a loop has LOADS loads and stores of it."""
    found = {}
    for body in loops(code):
        for size, suffix in UNITS.items():
            counts = [
                sum(
                    bool(re.search(rf"\b{op}\.E{re.escape(suffix)}(?!\.(?:U8|U16|64|128)\b)(?:\.[A-Z]+)* ", w))
                    for w in body
                )
                for op in ("LDG", "STG")
            ]
            if counts == [LOADS, LOADS]:
                found[size] = len(body) / LOADS
    return dict(sorted(found.items()))


def problem(figures: dict[str, Any]) -> str | None:
    """What is wrong with an architecture's code, or None."""
    if figures["spills"] or figures["stack"] or figures["local"]:
        return "spills registers"
    missing = [size for size in UNITS if size not in figures["per_unit"]]
    if missing:
        return f"has no loop of {LOADS} loads for units of {missing[0]} bytes"
    size, most = max(figures["per_unit"].items(), key=lambda item: item[1])
    return f"takes {most:g} instructions for {size} bytes" if most > MOST_PER_UNIT else None


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
            code = machine_code(objects, arch)
            figures["local"] = sum(bool(re.search(r"\b(?:LDL|STL)\b", words)) for _, words in code)
            figures |= {"instructions": len(code), "per_unit": per_unit(code)}
    if not found:
        raise SystemExit("ptxas reported no kernel: has its output changed?")
    wrong = 0
    for arch in sorted(found, key=lambda a: int(a[3:])):
        reason = problem(found[arch])
        wrong += reason is not None
        line = " ".join(f"{k}={v}" for k, v in found[arch].items()).replace(", ", ",")
        print(f"slice_channels {arch:<7} {line}{'  <-- ' + reason if reason else ''}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
