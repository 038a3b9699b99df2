#!/usr/bin/env bash
# Everything that needs a GPU, in one command, in under ten minutes on one card:
#
#   benchmarks/gpu/run.sh OUT [--dry-run] [STEP ...]
#
# Steps: build tests sanitizer whole_tables end_to_end pruned_speed scoring_step (all of them, in this order).
# Into OUT go results.json, results.md and log.txt. A step that fails or runs out of time is named in results.md and
# the others still run; the exit status is 1 then. --dry-run rehearses all of it on the CPU at tiny sizes.
# Needs Python 3.12 with PyTorch and Triton, and nvcc; wheels of what else is missing are taken from
# benchmarks/gpu/wheels (pack.sh fetches them). PYTHON names another interpreter.
set -uo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-python3}
[ $# -ge 1 ] || { sed -n '2,11p' "$0"; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
dry=()
if [ "${1:-}" = --dry-run ]; then
  dry=(--dry-run)
  shift
fi
if [ $# -gt 0 ]; then steps=("$@"); else steps=(build tests sanitizer whole_tables end_to_end pruned_speed scoring_step); fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/steps"
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_WAIT_POLICY=PASSIVE
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$work/triton} TRITON_DEFAULT_FP_FUSION=1 HF_HUB_OFFLINE=1
failed=()
order=0
TOTAL=585

# note NAME OUTCOME SECONDS: a step's outcome as a row of its own
note() {
  "$PYTHON" - "$work/steps/$(printf %02d $order)-$1-outcome.json" "$@" ${dry[0]:+dry} <<'PY'
import json, sys
path, name, outcome, seconds, *dry = sys.argv[1:]
row = {"operation": name, "outcome": outcome, "seconds": float(seconds)}
json.dump({"step": f"{name}: outcome", "about": {}, "rehearsal": bool(dry), "rows": [row]}, open(path, "w"))
PY
}

# step NAME LIMIT_SECONDS COMMAND...: run, log, note; a failure doesn't stop the rest
step() {
  local name=$1 limit=$2 begin=$SECONDS status outcome=ok
  shift 2
  case " ${steps[*]} " in *" $name "*) ;; *) return 0 ;; esac
  order=$((order + 1))
  # ten minutes in all, whatever the steps were given
  [ $((TOTAL - SECONDS)) -ge "$limit" ] || limit=$((TOTAL > SECONDS + 5 ? TOTAL - SECONDS : 5))
  echo "== $name" | tee -a "$out/log.txt"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$out/log.txt"
  status=${PIPESTATUS[0]}
  if [ "$status" = 124 ] || [ "$status" = 137 ]; then outcome="stopped after $limit s"; elif [ "$status" != 0 ]; then outcome="failed ($status)"; fi
  [ "$outcome" = ok ] || failed+=("$name: $outcome")
  echo "== $name: $outcome, $((SECONDS - begin)) s" | tee -a "$out/log.txt"
  note "$name" "$outcome" $((SECONDS - begin))
}

measure() { # NAME LIMIT: a Python step of this folder
  step "$1" "$2" "$PYTHON" "benchmarks/gpu/$1.py" "${dry[@]}" --json "$work/steps/$(printf %02d $((order + 1)))-$1.json"
}

install_wheels() {
  [ ${#dry[@]} = 0 ] || return 0
  compgen -G "benchmarks/gpu/wheels/*.whl" >/dev/null || return 0
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$work/site" benchmarks/gpu/wheels/*.whl &&
    export PYTHONPATH=$PYTHONPATH:$work/site
}

build() {
  local cuda=1
  [ ${#dry[@]} = 0 ] || cuda=auto
  "$PYTHON" -c 'import torch, diffusers, triton; print("torch", torch.__version__, "diffusers", diffusers.__version__, "triton", triton.__version__)' || return 1
  if [ ${#dry[@]} != 0 ] && "$PYTHON" -c 'import diffprune_fast._cpu' 2>/dev/null; then
    echo "the extensions are there already"
  else
    DIFFPRUNE_CUDA=$cuda "$PYTHON" setup.py -q build_ext --inplace || return 1
  fi
  "$PYTHON" -m diffprune_fast info || "$PYTHON" -c 'from diffprune_fast import ops; print(ops.info())'
  [ ${#dry[@]} != 0 ] || "$PYTHON" -c 'from diffprune_fast import ops; b = ops.backends(); assert b["slice_channels/cuda"] == b["channel_scores/triton"] == "ok", b'
}

tests() {
  [ ${#dry[@]} = 0 ] || export DIFFPRUNE_GPU_TESTS=cpu
  "$PYTHON" -m pytest tests/gpu -q -p no:cacheprovider -o addopts= -o filterwarnings=default --durations=5
}

sanitizer() {
  local program=("$PYTHON" benchmarks/gpu/sanitized.py "${dry[@]}" --json "$work/sanitized.json") tool status=0
  if [ ${#dry[@]} != 0 ]; then
    "${program[@]}"
    return
  fi
  "${program[@]}" || return 1
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on PATH: left out"; return 0; }
  for tool in memcheck racecheck; do
    echo "compute-sanitizer $tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 "${program[@]}" || status=1
  done
  return $status
}

# functions run under timeout in a shell of their own
export PYTHON work
export -f build tests sanitizer

: >"$out/log.txt"
install_wheels || failed+=("wheels could not be installed")
step build 90 bash -c "dry=(${dry[*]:-}); build"
step tests 90 bash -c "dry=(${dry[*]:-}); tests"
step sanitizer 75 bash -c "dry=(${dry[*]:-}); sanitizer"
measure whole_tables 110
measure end_to_end 150
measure pruned_speed 40
measure scoring_step 40

"$PYTHON" benchmarks/gpu/report.py "$work/steps" "$out" | tee -a "$out/log.txt"
if [ ${#failed[@]} != 0 ]; then
  printf 'failed: %s\n' "${failed[@]}" | tee -a "$out/log.txt"
  exit 1
fi
