"""The package as it is found: from the source tree, as a build, and beside the ecosystem's other packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import diffprune_fast
from diffprune_fast import ops

ROOT = Path(__file__).resolve().parents[1]

AVAILABILITY = """
import json
import diffusers.utils.import_utils as u
flags = {name: getattr(u, name) for name in dir(u) if name.startswith("_") and name.endswith("_available")}
print(json.dumps({name: value for name, value in flags.items() if isinstance(value, bool)}))
"""


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DIFFPRUNE_CUDA")} | environment
    return subprocess.run(arguments, cwd=cwd, env=env, capture_output=True, text=True)


def python(code: str, cwd: Path, **environment: str) -> str:
    done = run(sys.executable, "-c", code, cwd=cwd, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_diffusers_sees_the_same_packages_from_the_repository_root(tmp_path: Path) -> None:
    here, elsewhere = (json.loads(python(AVAILABILITY, cwd)) for cwd in (ROOT, tmp_path))
    assert here
    assert here == elsewhere


def test_kernels_is_no_package_of_ours() -> None:
    """A folder without ``__init__.py`` gives way to any installed package of that name."""
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)"
    assert python(code, ROOT) == "None"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_kernels_are_found_from_the_repository_root() -> None:
    code = "import importlib.util as u; print(u.find_spec('diffprune_fast.kernels.channel_scores').origin)"
    assert python(code, ROOT) == str(ROOT / "kernels" / "triton" / "channel_scores.py")


def test_importing_the_package_imports_neither_torch_nor_triton() -> None:
    code = "import sys, diffprune_fast; print([n for n in ('torch', 'triton', 'diffusers') if n in sys.modules])"
    assert python(code, ROOT) == "[]"


def build(tmp_path: Path, *commands: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py with everything it writes under tmp_path, and a torch that can't be imported."""
    (tmp_path / "torch.py").write_text("raise RuntimeError('the build must not import torch')\n")
    arguments = ["egg_info", "--egg-base", str(tmp_path), *commands]
    return run(sys.executable, "setup.py", *arguments, cwd=ROOT, PYTHONPATH=str(tmp_path), **environment)


def test_a_build_needs_no_torch_and_holds_the_triton_kernels(tmp_path: Path) -> None:
    done = build(tmp_path, "build_py", "--build-lib", str(tmp_path / "lib"))
    assert done.returncode == 0, done.stderr
    built = {p.relative_to(tmp_path / "lib").as_posix() for p in (tmp_path / "lib").rglob("*.py")}
    assert {name.split("/")[0] for name in built} == {"diffprune_fast"}
    for module in (ROOT / "kernels" / "triton").glob("*.py"):
        assert f"diffprune_fast/kernels/{module.name}" in built
    code = "import importlib.util as u; print(u.find_spec('diffprune_fast.kernels.channel_scores').origin)"
    found = python(code, tmp_path / "lib", PYTHONPATH=str(tmp_path / "lib"))
    assert found == str(tmp_path / "lib" / "diffprune_fast" / "kernels" / "channel_scores.py")


def test_a_build_without_a_compiler_says_what_is_missing(tmp_path: Path) -> None:
    done = build(
        tmp_path, "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"),
        CC="/nonexistent/cc", CXX="/nonexistent/c++", DIFFPRUNE_CUDA="0",
    )  # fmt: skip
    assert done.returncode != 0
    assert "needs a C++17 compiler" in done.stderr


@pytest.mark.parametrize(
    ("value", "message"),
    [("yes", "expected auto, 1 or 0"), ("1", "no nvcc was found")],
)
def test_a_cuda_build_that_cannot_be_had_says_so(tmp_path: Path, value: str, message: str) -> None:
    if value == "1" and (Path("/usr/local/cuda/bin/nvcc").exists() or not list((ROOT / "csrc/cuda").glob("*.cu"))):
        pytest.skip("nvcc stands in its default place, or there is nothing to compile")
    done = build(tmp_path, "--version", DIFFPRUNE_CUDA=value, PATH="/usr/bin:/bin", CUDA_HOME="", CUDA_PATH="")
    assert done.returncode != 0
    assert message in done.stderr


def test_a_wheel_holds_the_cuda_extension_only_where_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.touch()
    nvcc.chmod(0o755)
    code = (
        "import runpy, setuptools;"
        "setuptools.setup = lambda **options: print([e.name for e in options['ext_modules']]);"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    for asked, found in ((None, False), ("1", bool(list((ROOT / "csrc/cuda").glob("*.cu")))), ("0", False)):
        given = {"CUDA_HOME": str(tmp_path)} | ({} if asked is None else {"DIFFPRUNE_CUDA": asked})
        done = run(sys.executable, "-c", code, cwd=ROOT, **given)
        assert ("diffprune_fast._cuda" in done.stdout) == found, done.stdout + done.stderr


def test_version_is_the_distributions() -> None:
    done = run(sys.executable, "setup.py", "--version", cwd=ROOT, DIFFPRUNE_CUDA="0")
    assert done.stdout.split()[-1] == diffprune_fast.__version__


def test_backends_are_ok_or_say_why_not() -> None:
    answers = ops.backends()
    assert answers["channel_scores/reference"] == answers["slice_channels/reference"] == "ok"
    assert {name.split("/")[0] for name in answers} == {"channel_scores", "slice_channels"}
    assert all(answers.values())


def test_info_names_versions_devices_and_every_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("DIFFPRUNE_BACKEND", "reference")
    text = ops.info()
    assert f"diffprune_fast {diffprune_fast.__version__}" in text
    assert torch.__version__ in text
    assert "DIFFPRUNE_BACKEND = reference" in text
    for name, answer in ops.backends().items():
        assert any(line.split()[:1] == [name.split("/")[1]] and answer in line for line in text.splitlines())


def test_a_missing_extension_is_a_reason_and_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from diffprune_fast.ops import cpu

    monkeypatch.setattr(cpu, "_missing", "the C++ extension is not built")
    tensor = torch.arange(6.0).view(3, 2)
    ops.slice_channels_([tensor], [ops.Slice({0: torch.tensor([0, 2])})])
    assert tensor.tolist() == [[0, 1], [4, 5]]
    with pytest.raises(ops.BackendError, match="not built"):
        ops.slice_channels_([tensor], [ops.Slice({0: torch.tensor([0])})], backend="cpu")
