#!/usr/bin/env bash
# Fetch the wheels that a bare GPU machine lacks into benchmarks/gpu/wheels, for run.sh to install there:
#
#   benchmarks/gpu/pack.sh [PYTHON_VERSION]
#
# The machine is taken to have Python 3.12 (or what is named), PyTorch, Triton, NumPy, SciPy, safetensors,
# huggingface_hub, rich, tqdm, typer, pytest and pybind11; x86-64 Linux. PYTHON names the interpreter
# whose pip fetches.
set -euo pipefail
cd "$(dirname "$0")"

version=${1:-3.12}
wheels=wheels
# diffusers and Torch-Pruning, and what diffusers needs that PyTorch images don't have. --no-deps: nothing of PyTorch.
packages=(diffusers==0.42.1 torch-pruning==1.6.1)
# setuptools: older ones don't read the licence field of pyproject.toml.
packages+=(setuptools importlib_metadata zipp regex requests charset-normalizer idna certifi urllib3)

rm -rf "$wheels"
mkdir "$wheels"
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do platforms+=(--platform "${tag}_x86_64"); done
"${PYTHON:-python3}" -m pip download --disable-pip-version-check -q --no-deps --only-binary=:all: \
  --python-version "$version" --implementation cp "${platforms[@]}" -d "$wheels" "${packages[@]}"
git rev-parse --short HEAD >"$wheels/commit"
ls -l "$wheels"
