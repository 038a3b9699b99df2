"""``make test-matrix``: the tests on other machines than this one, as far as one machine can be another.

``nox --list`` names the sessions. ``nox -s machines`` runs in the interpreter that nox was started with and installs
nothing; the others make an environment each, of the versions that their index has.
"""

from __future__ import annotations

import itertools
import os
import sys

import nox

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["machines", "pythons", "oldest"]

# What depends on instruction sets, threads and versions: kernels, exactness of slices, checkpoints, pipelines.
QUICK = [
    "tests/ops",
    "tests/plan",
    "tests/objective",
    "tests/selection",
    "tests/checkpoint",
    "tests/slicing/test_prune.py",
    "tests/scoring/test_estimators.py",
    "tests/pipelines/test_hostile_folders.py",
]

CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def tests(session: nox.Session, python: str, **env: str) -> None:
    """The files that were asked for after ``--``, or ``QUICK``."""
    env = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", **env}
    asked = session.posargs or QUICK
    session.run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *asked, env=env, external=True)


@nox.session(venv_backend="none")
@nox.parametrize(("capability", "threads"), list(itertools.product(["default", "avx2"], [1, 4])))
def machines(session: nox.Session, capability: str, threads: int) -> None:
    """PyTorch's kernels for another processor, with one thread and with four."""
    tests(
        session,
        sys.executable,
        ATEN_CPU_CAPABILITY=capability,
        OMP_NUM_THREADS=str(threads),
        DIFFPRUNE_TEST_THREADS=str(threads),
    )


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
def pythons(session: nox.Session) -> None:
    """The newest of everything, on each Python that is here."""
    install(session)
    tests(session, "python")


@nox.session
@nox.parametrize(
    "versions",
    [
        ["torch==2.6.0", "numpy<2", "diffusers==0.32.2", "transformers==4.48.3"],
        ["torch==2.6.0", "numpy>=2"],
        ["torch", "diffusers==0.32.2", "transformers==4.48.3"],
    ],
    ids=["all oldest", "torch oldest", "diffusers oldest"],
)
def oldest(session: nox.Session, versions: list[str]) -> None:
    """The oldest versions that pyproject.toml allows."""
    install(session, *versions)
    tests(session, "python")


def install(session: nox.Session, *versions: str) -> None:
    """The package with what its tests need. TORCH_INDEX: where PyTorch is from, "" for pip's own index."""
    index = os.environ.get("TORCH_INDEX", CPU_INDEX)
    torch = next((v for v in versions if v.startswith("torch")), "torch>=2.6")
    session.install(torch, *(["--index-url", index] if index else []))
    session.install("--editable", ".[test]", *versions, env={"DIFFPRUNE_CUDA": "0"})
