#!/usr/bin/env bash
# Everything that needs a GPU, in calls of under ten minutes on one card, what matters most first:
#
#   benchmarks/gpu/run.sh OUT [--dry-run] [first | second | third | STEP ...]
#
# first:  build kernels tests profile scoring_step end_to_end
# second: build compensation sweep baselines
# third:  build sanitizer pruned_speed compiled_step
#
# Into OUT go results.json and results.md, made anew after every step from what the steps have left in OUT/steps, and
# log.txt; a later call adds to what is there. A step that fails or runs out of time is named in results.md and the
# others still run; the exit status is 1 then. --dry-run rehearses it on the CPU at tiny sizes, by default all of it.
# Needs Python 3.12 with PyTorch and Triton, and nvcc; wheels of what else is missing are taken from
# benchmarks/gpu/wheels (pack.sh fetches them). PYTHON names another interpreter.
set -uo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-python3}
[ $# -ge 1 ] || { sed -n '2,15p' "$0"; exit 2; }
mkdir -p "$1/steps"
out=$(cd "$1" && pwd)
shift
dry=()
if [ "${1:-}" = --dry-run ]; then
  dry=(--dry-run)
  shift
fi
first=(build kernels tests profile scoring_step end_to_end)
second=(build compensation sweep baselines)
third=(build sanitizer pruned_speed compiled_step)
case "${1:-}" in
  "") if [ ${#dry[@]} = 0 ]; then steps=("${first[@]}"); else steps=("${first[@]}" "${second[@]}" "${third[@]}"); fi ;;
  first) steps=("${first[@]}") ;;
  second) steps=("${second[@]}") ;;
  third) steps=("${third[@]}") ;;
  *) steps=("$@") ;;
esac

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_WAIT_POLICY=PASSIVE
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/diffprune-triton} TRITON_DEFAULT_FP_FUSION=1 HF_HUB_OFFLINE=1
failed=()
TOTAL=560
# a rehearsal has all three calls in one, on a machine that may be busy
[ ${#dry[@]} = 0 ] || TOTAL=3600

# What the card's clocks and temperature are; empty without one.
clocks() {
  command -v nvidia-smi >/dev/null || return 0
  nvidia-smi --query-gpu=driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw --format=csv,noheader | head -1
}

# note NAME OUTCOME SECONDS CLOCKS: a step's outcome as a row of its own
note() {
  "$PYTHON" - "$out/steps/$(number "$1")-$1-outcome.json" "$@" ${dry[0]:+dry} <<'PY'
import json, sys
path, name, outcome, seconds, clocks, *dry = sys.argv[1:]
row = {"operation": name, "outcome": outcome, "seconds": float(seconds), "clocks": clocks or None}
json.dump({"step": f"{name}: outcome", "about": {}, "rehearsal": bool(dry), "rows": [row]}, open(path, "w"))
PY
}

report() { "$PYTHON" benchmarks/gpu/report.py "$out/steps" "$out"; }

# The same for a step in every call, so that a later one takes the place of an earlier.
number() {
  local i=0 name
  for name in "${first[@]}" "${second[@]:1}" "${third[@]:1}"; do
    i=$((i + 1))
    [ "$name" != "$1" ] || break
  done
  printf %02d "$i"
}

# step NAME LIMIT_SECONDS COMMAND...: run, log, note, report; a failure doesn't stop the rest
step() {
  local name=$1 limit=$2 begin=$SECONDS before status outcome=ok
  shift 2
  case " ${steps[*]} " in *" $name "*) ;; *) return 0 ;; esac
  [ ${#dry[@]} = 0 ] || limit=$((limit * 5))
  # ten minutes in all, whatever the steps were given
  [ $((TOTAL - SECONDS)) -ge "$limit" ] || limit=$((TOTAL > SECONDS + 5 ? TOTAL - SECONDS : 5))
  before=$(clocks)
  echo "== $name" | tee -a "$out/log.txt"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$out/log.txt"
  status=${PIPESTATUS[0]}
  if [ "$status" = 124 ] || [ "$status" = 137 ]; then outcome="stopped after $limit s"; elif [ "$status" != 0 ]; then outcome="failed ($status)"; fi
  [ "$outcome" = ok ] || failed+=("$name: $outcome")
  echo "== $name: $outcome, $((SECONDS - begin)) s" | tee -a "$out/log.txt"
  note "$name" "$outcome" $((SECONDS - begin)) "${before:+$before -> $(clocks)}"
  report >/dev/null || failed+=("the report after $name")
}

measure() { # NAME LIMIT FILE [ARGUMENT...]: a Python step of this folder
  local name=$1 limit=$2 file=$3
  shift 3
  step "$name" "$limit" "$PYTHON" "benchmarks/gpu/$file.py" "${dry[@]}" --json "$out/steps/$(number "$name")-$name.json" "$@"
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
  "$PYTHON" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)' || return 1
  if [ ${#dry[@]} != 0 ] && "$PYTHON" -c 'import diffprune_fast._cpu' 2>/dev/null; then
    echo "the extensions are there already"
  else
    # for this card only
    DIFFPRUNE_CUDA_ARCHITECTURES=$("$PYTHON" -c 'import torch; print(*torch.cuda.get_device_capability(), sep="") if torch.cuda.is_available() else ""')
    export DIFFPRUNE_CUDA_ARCHITECTURES
    DIFFPRUNE_CUDA=$cuda "$PYTHON" setup.py -q build_ext --inplace || return 1
  fi
  "$PYTHON" -m diffprune_fast info || "$PYTHON" -c 'from diffprune_fast import ops; print(ops.info())'
  [ ${#dry[@]} != 0 ] || "$PYTHON" -c 'from diffprune_fast import ops; b = ops.backends(); assert b["slice_channels/cuda"] == b["channel_scores/triton"] == "ok", b'
}

tests() {
  local parallel=()
  [ ${#dry[@]} = 0 ] || export DIFFPRUNE_GPU_TESTS=cpu
  if [ ${#dry[@]} = 0 ] && "$PYTHON" -c 'import xdist' 2>/dev/null; then parallel=(-n 8); fi
  "$PYTHON" -m pytest tests/gpu -v --tb=short "${parallel[@]}" -p no:cacheprovider -o addopts= -o filterwarnings=default --durations=5
}

sanitizer() {
  local program=("$PYTHON" benchmarks/gpu/sanitized.py "${dry[@]}" --json "$work/sanitized.json") tool op kernel sanitize status=0
  "${program[@]}" || return 1
  [ ${#dry[@]} = 0 ] || return 0
  sanitize=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer) || { echo "there is no compute-sanitizer: left out"; return 0; }
  for tool in memcheck racecheck; do
    for op in channel_scores slice_channels; do
      kernel=$op
      [ "$op" = slice_channels ] || kernel=pass_over
      echo "compute-sanitizer $tool: $op"
      # only our kernels, and no errors of calls that PyTorch makes to find out what there is
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitize" --tool "$tool" --error-exitcode 9 --print-limit 20 \
        --kernel-name "kns=$kernel" --report-api-errors no "${program[@]}" --part "$op" || status=1
    done
  done
  return $status
}

# functions run under timeout in a shell of their own
export PYTHON work
export -f build tests sanitizer

echo "== run.sh ${dry[*]:-} ${steps[*]}" >>"$out/log.txt"
install_wheels || failed+=("wheels could not be installed")
step build 120 bash -c "dry=(${dry[*]:-}); build"
measure kernels 120 whole_tables --part ours
step tests 150 bash -c "dry=(${dry[*]:-}); tests"
measure profile 90 profiled
measure scoring_step 60 scoring_step
measure end_to_end 240 end_to_end
measure compensation 240 compensation
measure sweep 150 sweep
measure baselines 240 whole_tables --part others
step sanitizer 150 bash -c "dry=(${dry[*]:-}); sanitizer"
measure pruned_speed 120 pruned_speed
measure compiled_step 240 scoring_step --part compiled

report | tee -a "$out/log.txt"
if [ ${#failed[@]} != 0 ]; then
  printf 'failed: %s\n' "${failed[@]}" | tee -a "$out/log.txt"
  exit 1
fi
