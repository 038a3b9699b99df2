"""Compile every Triton kernel variant without a GPU, for NVIDIA and AMD, and refuse register spills.

    python benchmarks/gpu/compile_ahead.py [--quick] [--json FILE] [--ptx DIR]

Prints registers, shared memory and spills per variant and target. Exits with 1 if a variant spills, has no 16-byte
loads where weights and gradients lie in the same memory order, or zeroes gradients with no barrier behind their loads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TARGETS = (("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64))
DTYPES = ("fp32", "bf16", "fp16", "fp64")
CRITERIA = ("abs", "signed", "square", "magnitude")


def variants(quick: bool) -> list[dict[str, Any]]:
    """The specialisations of all three kernels. quick: one criterion, no fp64."""
    out: list[dict[str, Any]] = [
        {"kernel": "sum_partials", "partials": "fp32"},
        {"kernel": "sum_partials", "partials": "fp64"},
        {"kernel": "add_to_units", "scores": "fp64"},
        {"kernel": "add_to_units", "scores": "fp32"},
    ]
    flags = (False, True)
    for dtype, criterion, stacked, zero, same in itertools.product(DTYPES, CRITERIA, flags, flags, flags):
        if quick and (criterion != "abs" or dtype == "fp64"):
            continue
        if criterion == "magnitude" and stacked and not zero:
            continue  # without gradients there is no stack of them
        out.append(
            {"kernel": "pass_over_tensors", "dtype": dtype, "criterion": criterion, "stacked": stacked}
            | {"zero_grad": zero, "same_order": same}
        )
    return out


def source(variant: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Triton's ASTSource and options of one variant."""
    import torch
    import triton.language as tl
    from triton.compiler import ASTSource

    from diffprune_fast.kernels import channel_scores as module
    from diffprune_fast.kernels.score_tables import SUM_BLOCK, UNIT_BLOCK, block_shape

    if variant["kernel"] == "sum_partials":
        signature = {"partials": f"*{variant['partials']}", "streams": "*i64", "weights": "*fp64", "blocks": "*i32"}
        signature |= {"sums": "*fp64"}
        constants = {"BLOCK": SUM_BLOCK, "DEPTH": 8}
        kernel = module.sum_partials
    elif variant["kernel"] == "add_to_units":
        signature = {"sums": "*fp64", "first": "*i64", "order": "*i64", "scores": f"*{variant['scores']}"}
        signature |= {"n_units": "i32"}
        constants = {"BLOCK": UNIT_BLOCK, "DEPTH": 16}
        kernel = module.add_to_units
    else:
        name = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}[variant["dtype"]]
        dtype = getattr(torch, name)
        wide = "fp64" if variant["dtype"] == "fp64" else "fp32"
        rows, cols = block_shape(dtype, variant["stacked"], variant["same_order"])
        signature = {"tensors": "*i64", "layouts": "*i64", "items": "*i32", "starts": "*i32"}
        signature |= {"step_weights": "*fp32" if variant["stacked"] else "*fp64", "n_steps": "i32"}
        signature |= {"partials": f"*{wide}", "rows_per_item": "i32"}
        constants = {
            "DTYPE": getattr(tl, name),
            "WIDE": tl.float64 if wide == "fp64" else tl.float32,
            "CRITERION": module.CRITERIA[variant["criterion"]],
            "STACKED": variant["stacked"],
            "ZERO_GRAD": variant["zero_grad"],
            "SAME_ORDER": variant["same_order"],
            "VECTOR": 16 // dtype.itemsize,
            "BLOCK_ROWS": rows,
            "BLOCK_COLS": cols,
        }
        kernel = module.pass_over_tensors
    signature |= dict.fromkeys(constants, "constexpr")
    return ASTSource(kernel, signature, constexprs=constants), {"num_warps": module.NUM_WARPS}


def compile_one(task: tuple[dict[str, Any], tuple[str, Any, int], str | None]) -> dict[str, Any]:
    """Compile one variant for one target and read the compiler's figures."""
    import triton
    from triton.backends.compiler import GPUTarget

    variant, target, keep = task
    what, options = source(variant)
    compiled = triton.compile(what, target=GPUTarget(*target), options=options)
    figures = {"shared": compiled.metadata.shared} | zero_stores(compiled.asm["ttgir"])
    if target[0] == "cuda":
        figures |= ptxas_figures(compiled.asm["cubin"])
        text = compiled.asm["ptx"]
        # Triton writes 16-byte accesses as ld.global.v4.b32 or v2.b64
        figures["vector_loads"] = len(re.findall(r"ld\.global(?:\.\w+)*\.(?:v4\.b32|v2\.b64)", text))
    else:
        text = compiled.asm["amdgcn"]
        figures |= {
            "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", text).group(1)),
            "spills": int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text).group(1)),
            "vector_loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", text)),
        }
    if keep:
        label = "-".join(str(v) for v in variant.values())
        (Path(keep) / f"{label}-{target[1]}.s").write_text(text)
    return {"variant": variant, "target": f"{target[0]}:{target[1]}", **figures}


def zero_stores(ttgir: str) -> dict[str, int]:
    """Stores of blocks of zeros in Triton's GPU code, and how many of them have no barrier behind the last load.

    Loads and stores are laid out over a program's threads each on its own: without a barrier one thread zeroes what
    another has yet to read. Neither the interpreter nor compute-sanitizer sees that.
    """
    block = r"tensor<\d+x\d+x"
    zeros = set(re.findall(rf"(%[\w#]+) = arith\.constant dense<0(?:\.0*e\+00)?> : {block}", ttgir))
    stores = unordered = 0
    loaded = False
    for line in ttgir.splitlines():
        if re.search(r"= \w+\.(?:buffer_)?load\b", line) and re.search(block, line):
            loaded = True
        elif re.search(r"^\s*(?:gpu|ttg)\.barrier\b", line):
            loaded = False
        elif (stored := re.search(r"^\s*\w+\.(?:buffer_)?store [^,]+, (%[\w#]+)", line)) and stored[1] in zeros:
            stores += 1
            unordered += loaded
    return {"zero_stores": stores, "unordered_zeros": unordered}


def ptxas_figures(cubin: bytes) -> dict[str, int]:
    """Registers and spill bytes (local memory) of a cubin, as cuobjdump reports them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([cuobjdump(), "-res-usage", file.name], capture_output=True, text=True, check=True)
    usage = done.stdout + done.stderr
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage said nothing that could be read:\n{usage}")
    registers, stack, local = map(int, found.groups())
    return {"registers": registers, "spills": stack + local}


def cuobjdump() -> str:
    """The cuobjdump of the toolkit, or the one that Triton brings along."""
    import shutil

    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = shutil.which("cuobjdump") or (str(bundled) if bundled.is_file() else None)
    if found is None:
        raise FileNotFoundError("no cuobjdump: neither on PATH nor in the triton package")
    return found


def problem(row: dict[str, Any]) -> str | None:
    """What is wrong with a compiled variant, or None."""
    if row["spills"]:
        return f"spills {row['spills']} bytes"
    if row["variant"].get("same_order") and not row["vector_loads"]:
        return "has no 16-byte loads"
    if row["variant"].get("zero_grad") and not row["zero_stores"]:
        return "shows no store of zeros: has Triton's code changed?"
    return "zeroes gradients without a barrier behind their loads" if row["unordered_zeros"] else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one criterion, no float64")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--ptx", help="keep PTX and AMD assembly in this folder")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns while it is unset
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    begin = time.monotonic()
    tasks = [(v, t, args.ptx) for v in variants(args.quick) for t in TARGETS]
    with ProcessPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(compile_one, tasks, chunksize=4))
    failures = 0
    for row in rows:
        wrong = problem(row)
        failures += wrong is not None
        label = " ".join(f"{k}={v}" for k, v in row["variant"].items())
        figures = " ".join(f"{k}={v}" for k, v in row.items() if k not in ("variant", "target"))
        print(f"{row['target']:<11} {label:<95} {figures}{'  <-- ' + wrong if wrong else ''}")
    if args.json:
        import triton

        args.json.write_text(json.dumps({"triton": triton.__version__, "variants": rows}, indent=1) + "\n")
    print(f"{len(rows)} compiled in {time.monotonic() - begin:.0f} s, {failures} refused")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
