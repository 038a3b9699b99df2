"""Build of the package's native parts; everything else stands in pyproject.toml.

``diffprune_fast._cpu`` (csrc/, C++) is always built: without a C++17 compiler the build stops and says so.
``diffprune_fast._cuda`` (csrc/cuda) is built where ``DIFFPRUNE_CUDA`` asks for it: ``1``, ``auto`` (if nvcc is there),
``0`` (default: what a wheel holds is not for chance to decide). PyTorch is not needed for building, so it is never
imported here: one wheel serves every PyTorch version.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
KERNELS = "diffprune_fast.kernels"


def cpu_extension() -> Extension:
    """The C++ extension. DIFFPRUNE_SANITIZE=1 builds it with ASan and UBSan (see csrc/sanitize.sh)."""
    import pybind11

    sources = ["csrc/bindings.cpp", *sorted(p.as_posix() for p in Path("csrc/cpu").glob("*.cpp"))]
    headers = sorted(p.as_posix() for p in Path("csrc").rglob("*.h") if "cuda" not in p.parts)
    if sys.platform == "win32":
        flags, link = ["/std:c++17", "/O2", "/EHsc"], []
    else:
        # -ffp-contract=off: a fused multiply-add would make the bits depend on the instruction set
        flags = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra", "-pthread"]
        link = ["-pthread"]
        if os.environ.get("DIFFPRUNE_SANITIZE", "0") == "1":
            sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
            flags += [*sanitize, "-O1", "-g", "-fno-omit-frame-pointer"]
            link += sanitize
    return Extension(
        "diffprune_fast._cpu",
        sources=sources,
        depends=headers,
        include_dirs=["csrc", pybind11.get_include()],
        extra_compile_args=flags,
        extra_link_args=link,
        language="c++",
    )


def cuda_extension() -> Extension | None:
    """The CUDA extension if it can and shall be built, else None."""
    wanted = os.environ.get("DIFFPRUNE_CUDA", "0").lower()
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"DIFFPRUNE_CUDA={wanted!r}: expected auto, 1 or 0")
    sources = sorted(p.as_posix() for p in Path("csrc/cuda").glob("*.cu"))
    if wanted == "0" or not sources:
        return None
    if find_nvcc() is None:
        if wanted == "1":
            raise SystemExit("DIFFPRUNE_CUDA=1 but no nvcc was found: put it on PATH or set CUDA_HOME")
        return None
    return Extension("diffprune_fast._cuda", sources=sources, language="c++")


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of PATH, or of the usual place."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").is_file():
            return str(Path(home) / "bin" / "nvcc")
    default = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(default) if default.is_file() else None)


class BuildExtensions(build_ext):
    """C++ files are compiled side by side by ninja; CUDA files by nvcc."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name.endswith("._cuda"):
            sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
            import build_cuda  # csrc/cuda/build_cuda.py: nvcc's flags and architectures

            build_cuda.build(self, ext, find_nvcc())
            return
        if self.compiler.compiler_type == "unix" and (ninja := find_ninja()):
            self.build_with_ninja(ext, ninja)
            return
        super().build_extension(ext)

    def build_with_ninja(self, ext: Extension, ninja: list[str]) -> None:
        """Objects through ninja (parallel, and only what changed), then setuptools' own link step."""
        work = Path(self.build_temp).resolve() / ext.name
        work.mkdir(parents=True, exist_ok=True)
        compiler = [*getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)]
        includes = [f"-I{Path(d).resolve()}" for d in [*ext.include_dirs, *self.compiler.include_dirs]]
        command = " ".join(shell_quote(a) for a in [*compiler, *includes, *ext.extra_compile_args])
        lines = [
            "ninja_required_version = 1.3",
            "rule cxx",
            f"  command = {command} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = C++ $in",
        ]
        objects = []
        for source in ext.sources:
            target = work / (source.replace("/", "_") + ".o")
            objects.append(str(target))
            lines.append(f"build {ninja_quote(target)}: cxx {ninja_quote(Path(source).resolve())}")
        (work / "build.ninja").write_text("\n".join(lines) + "\n")
        done = subprocess.run([*ninja, "-C", str(work)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(
                f"the C++ extension {ext.name} could not be compiled; diffprune_fast needs a C++17 compiler "
                f"(g++ >= 9 or clang++ >= 10; CXX names another one)\n{done.stdout}{done.stderr}"
            )
        full_path = self.get_ext_fullpath(ext.name)
        Path(full_path).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, full_path, extra_postargs=ext.extra_link_args, target_lang="c++", build_temp=str(work)
        )


class BuildPython(build_py):
    """Installs the modules of kernels/triton as diffprune_fast.kernels.

    In a source tree diffprune_fast/kernels/__init__.py extends its own ``__path__`` to the same folder, so that
    nothing has to be installed there.
    """

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        if package == KERNELS:
            triton = super().find_package_modules(package, "kernels/triton")
            modules += [module for module in triton if module[1] != "__init__"]
        return modules


def find_ninja() -> list[str] | None:
    """The ninja of the build environment, or of PATH."""
    try:
        import ninja

        return [str(Path(ninja.BIN_DIR) / "ninja")]
    except ImportError:
        path = shutil.which("ninja")
        return [path] if path else None


def shell_quote(text: str) -> str:
    import shlex

    return shlex.quote(text).replace("$", "$$")


def ninja_quote(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


os.chdir(ROOT)
cuda = cuda_extension()
setup(
    packages=find_packages(include=["diffprune_fast", "diffprune_fast.*"]),
    ext_modules=[cpu_extension(), *([cuda] if cuda else [])],
    cmdclass={"build_ext": BuildExtensions, "build_py": BuildPython},
)
