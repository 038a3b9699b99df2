#!/bin/sh
# Builds the C++ extension with ASan and UBSan into a folder of its own and runs its tests there.
# Usage: csrc/sanitize.sh [pytest options]; PYTHON names the interpreter.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
work=$(mktemp -d)
trap 'cat "$work"/report.* 2>/dev/null || true; rm -rf "$work"' EXIT

cd "$root"
csrc/fuzz.sh 200000
DIFFPRUNE_SANITIZE=1 DIFFPRUNE_CUDA=0 "$python" setup.py -q \
    egg_info --egg-base "$work" build --build-base "$work/build" --build-lib "$work/lib"

# The interpreter itself is not instrumented: the runtime has to be there first, and Python's own leaks don't count.
cxx=${CXX:-c++}
LD_PRELOAD="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libubsan.so)"
export LD_PRELOAD
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:log_path=$work/report
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1:log_path=$work/report
# What the CUDA kernel's tests compile for the host.
export CXX="$cxx -fsanitize=address,undefined -fno-sanitize-recover=all"
cd "$work/lib"
PYTHONPATH="$work/lib" "$python" -c "import diffprune_fast._cpu as m; assert m.__file__.startswith('$work'), m.__file__"
PYTHONPATH="$work/lib" "$python" -m pytest -q -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider \
    "$root/tests/ops/test_channel_scores.py" "$root/tests/ops/test_slice_channels.py" \
    "$root/tests/ops/test_cpu_tables.py" "$root/tests/ops/test_cuda_slice_channels.py" "$@"
