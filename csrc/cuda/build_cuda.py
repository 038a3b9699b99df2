"""Builds ``diffprune_fast._cuda``: device code by nvcc for every architecture at once, the rest by the C++ compiler.

No PyTorch headers or libraries, and the CUDA runtime is linked statically: one build serves every PyTorch version, and
importing it needs no driver.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# One per generation whose machine code differs; newer minor versions run their generation's code.
ARCHITECTURES = (80, 86, 89, 90, 100, 110, 120)
# Names others, comma-separated: "90" builds for one card only, in a seventh of the time.
ENVIRONMENT = "DIFFPRUNE_CUDA_ARCHITECTURES"


def build(command: Any, ext: Any, nvcc: str) -> None:
    """Called by setup.py's build_ext. Raises SystemExit with the compiler's words if anything fails."""
    import pybind11

    work = Path(command.build_temp).resolve() / ext.name
    work.mkdir(parents=True, exist_ok=True)
    device = work / "slice_channels.o"
    run([nvcc, *nvcc_flags(nvcc), "-c", str(HERE / "slice_channels.cu"), "-o", str(device)])
    compiler = command.compiler
    host = compiler.compile(
        [os.path.relpath(HERE / "bindings.cpp")],
        output_dir=str(work),
        include_dirs=[str(HERE), pybind11.get_include(), *compiler.include_dirs],
        extra_postargs=["-std=c++17", "-O2", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"],
    )
    target = Path(command.get_ext_fullpath(ext.name))
    target.parent.mkdir(parents=True, exist_ok=True)
    compiler.link_shared_object(
        [*host, str(device)],
        str(target),
        extra_postargs=[str(static_runtime(nvcc)), "-ldl", "-lrt", "-lpthread"],
        target_lang="c++",
        build_temp=str(work),
    )


def nvcc_flags(nvcc: str, strict: bool = False) -> list[str]:
    """Machine code for each architecture that this nvcc knows, and PTX of the newest for those to come.

    strict: warnings are errors. Not where a user installs: an nvcc that is yet to come has warnings that are too.
    """
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    named = tuple(int(a) for a in os.environ.get(ENVIRONMENT, "").split(",") if a.strip())
    offered = [a for a in named or ARCHITECTURES if f"compute_{a}" in known]
    if not offered:
        wanted = ", ".join(map(str, named or ARCHITECTURES))
        raise SystemExit(f"{nvcc} knows none of the architectures {wanted}: it offers {', '.join(known)}")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in offered]
    targets.append(f"-gencode=arch=compute_{offered[-1]},code=compute_{offered[-1]}")
    flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-cudart=static"]
    if strict:
        flags.append("-Werror=all-warnings")
    # -Xptxas -v: registers, shared memory and spills of each architecture, for benchmarks/gpu/check_machine_code.py
    return [*flags, f"--threads={os.cpu_count() or 1}", "-Xptxas=-v", *targets]


def static_runtime(nvcc: str) -> Path:
    """libcudart_static.a of the toolkit that nvcc belongs to."""
    home = Path(nvcc).resolve().parents[1]
    dry = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    tops = [line.split("=", 1)[1].strip() for line in dry.splitlines() if line.startswith("#$ TOP=")]
    for root in (*[Path(t) for t in tops], home):
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            if (root / folder / "libcudart_static.a").is_file():
                return (root / folder / "libcudart_static.a").resolve()
    raise SystemExit(f"no libcudart_static.a beside {nvcc}: install the toolkit's CUDA runtime development files")


def run(arguments: list[str]) -> str:
    """Run a compiler; its output, or SystemExit with it."""
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            "the CUDA extension could not be compiled (DIFFPRUNE_CUDA=0 builds the package without it)\n"
            f"{' '.join(arguments)}\n{done.stdout}{done.stderr}"
        )
    return done.stdout + done.stderr


if __name__ == "__main__":
    print(" ".join(nvcc_flags(sys.argv[1] if len(sys.argv) > 1 else "nvcc")))
