#!/bin/sh
# Random tables through the CPU kernels under ASan and UBSan. Usage: csrc/fuzz.sh [executions [first seed]]
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cd "$root/csrc"
"${CXX:-c++}" -std=c++17 -O2 -g -fno-omit-frame-pointer -ffp-contract=off -pthread \
    -fsanitize=address,undefined -fno-sanitize-recover=all -I. fuzz_tables.cpp cpu/*.cpp -o "$work/fuzz_tables"
ASAN_OPTIONS=detect_leaks=1 "$work/fuzz_tables" "${1:-200000}" "${2:-0}"
