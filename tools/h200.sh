#!/usr/bin/env bash
# Tests, profiles, benchmarks and tunes on an H200 (or H100: rows say which) in 15 minutes in all.
#
#   tools/h200.sh PEERS_FOLDER [OUT]      PEERS_FOLDER holds any of fla sfnsa xunhao fsa lucidrains
#   tools/h200.sh --estimate              seconds of each step, from counts; needs no GPU
#
# Steps run in order of importance, each within a time limit: machine, compiling ahead, every op
# against the reference at 8K tokens (a process per op), the profile at 64K, ours against cuDNN and
# SFNSA at 64K (decode first), named plan rows against others, then the rest. What did not fit is
# done by the same command: finished steps are skipped, half-finished ones go on. A step that is
# killed leaves every row it had. Where OUT comes back empty (a fresh machine), put what it held
# into EARLIER; it is copied in first. No network, no installation: the repository is used in place.
#
# Environment: BUDGET (seconds of this call, 520), PYTHON (python3), REVISION (of this project,
# where git cannot say), STEPS (only these, by name), AB (plan rows, as op.kernel), EARLIER
# (h200-earlier in the repository), DRY_RUN=1 (a CPU, interpreted, tiny: shows the control flow).
#
# OUT: steps.jsonl (what ran, how it ended, on what), tests.jsonl (a line per test, with traceback),
# prewarm.jsonl, profile.jsonl, bench.jsonl, tune.jsonl, plans.json (all tile plans after tuning;
# `python -m tools.tune --install` puts them in place), machine.txt, kind (h200 or h100).
# Exit status: 0 all done, 3 steps are left for another run, 1 a step failed; 2 nothing could run:
# wrong arguments, or kernels that cannot run on this machine (the reason is printed).
set -uo pipefail

(($# >= 1)) || { sed -n '2,24s/^# \{0,1\}//p' "$0"; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
if [[ $1 == --estimate ]]; then cd "$root" && exec "${PYTHON:-python3}" -m tools.prewarm --estimate; fi
started=$SECONDS
peers=$(realpath -m "$1")
out=$(realpath -m "${2:-$root/h200-results}")
budget=${BUDGET:-520}
python=${PYTHON:-python3}
dry=${DRY_RUN:-}
mkdir -p "$out"
cd "$root" || exit 2
earlier=${EARLIER:-$root/h200-earlier}
if [[ -d $earlier && ! -e $out/steps.jsonl ]]; then cp -r "$earlier/." "$out/"; fi
other=$([[ $dry ]] && echo false || echo true)
if grep -qs "\"dry_run\": $other" "$out/steps.jsonl"; then
  echo "$out holds results of a run with the other setting of DRY_RUN; give another OUT" >&2
  exit 2
fi
revision=${REVISION:-$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
for folder in /usr/local/cuda/bin /opt/nvidia/nsight-compute/*/; do # ncu, compute-sanitizer
  [[ ! -d $folder ]] || PATH="$PATH:${folder%/}"
done
export SERIAL='' # 1: tests one after the other, where memory or a process per op wants it
export PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/nsa-h200-triton}
failed=0
left=0

remaining() { echo $((budget - (SECONDS - started))); }

note() { # NAME STATUS SECONDS CODE
  printf '{"step": "%s", "status": "%s", "seconds": %d, "exit": %d, "kind": "%s", "revision": "%s", "dry_run": %s}\n' \
    "$1" "$2" "$3" "$4" "$(cat "$out/kind" 2>/dev/null || echo unknown)" "$revision" \
    "$([[ $dry ]] && echo true || echo false)" >>"$out/steps.jsonl"
}

# step NAME SECONDS COMMAND...: at most SECONDS, and what is left of the budget. The command sees
# its limit as $LIMIT; exit status 3 means that it has more to do. Failed steps are tried again by
# the next run. That a step began is noted first: what is killed with this script is seen, too.
step() {
  local name=$1 limit=$2 begun=$SECONDS status
  shift 2
  code=0
  [[ -z ${STEPS:-} || " $STEPS " == *" $name "* ]] || return 0
  if grep -qs "\"step\": \"$name\", \"status\": \"done\"" "$out/steps.jsonl"; then
    echo "== $name: done by an earlier run"
    return 0
  fi
  ((limit = limit < $(remaining) ? limit : $(remaining)))
  if ((limit < 8)); then
    echo "== $name: no time left"
    left=1
    return 0
  fi
  echo "== $name (at most $limit s, $(remaining) s left)"
  note "$name" began 0 0
  LIMIT=$limit timeout -k 5 "$limit" bash -c 'set -o pipefail; "$@"' "$name" "$@"
  code=$?
  case $code in
    0) status=done ;;
    3 | 124 | 137) status=unfinished left=1 ;;
    *) status=failed failed=1 ;;
  esac
  note "$name" "$status" $((SECONDS - begun)) "$code"
  echo "== $name: $status after $((SECONDS - begun)) s"
}

# How long a command may begin new work, some seconds before `timeout` would end it.
inner() { echo $((LIMIT > 30 ? LIMIT - 12 : LIMIT * 2 / 3)); }

machine() {
  {
    nvidia-smi -q -d CLOCK,MEMORY 2>&1 | head -60
    for tool in ncu compute-sanitizer nvcc; do echo "$tool: $(command -v $tool || echo none)"; done
  } >"$out/machine.txt"
  "$python" - "${dry:+dry}" "$out/kind" <<'PY' | tee -a "$out/machine.txt"
import json, sys, torch
from nsa_neuron import environment, registry
from nsa_neuron.backends.cuda import devices
print(json.dumps(environment.describe()))
kind = devices.gpu().plans if torch.cuda.is_available() else "cpu"
open(sys.argv[2], "w").write(kind + "\n")
modes = registry.REGISTRY.get("cuda").modes()
print("cuda backend:", modes)
sys.exit(9 if modes["hw"] and not sys.argv[1] else 0)
PY
}

# Compiled kernels live as long as the machine, so this is done again on every fresh one.
prewarm() {
  local mark=$TRITON_CACHE_DIR/prewarmed-$revision
  [[ ! -e $mark ]] || return 0
  mkdir -p "$TRITON_CACHE_DIR"
  "$python" -m tools.prewarm --processes "$(nproc)" --seconds "$(inner)" --out "$out/prewarm.jsonl" || return
  touch "$mark"
}

tests() { # FILE of tests/cuda_hw, ARGUMENTS of pytest
  local file=tests/cuda_hw/$1 parallel=()
  shift
  # Compiling takes the time, not running.
  if [[ -z $dry$SERIAL ]] && "$python" -c "import xdist" 2>/dev/null; then
    parallel=(-n "$(($(nproc) < 12 ? $(nproc) : 12))" --dist worksteal)
  fi
  NSA_HW_TESTS_ON_CPU=$dry NSA_HW_RESULTS=$out/tests.jsonl "$python" -m pytest -q \
    -p no:cacheprovider "${parallel[@]}" "$file" "$@" 2>&1 | tee -a "$out/tests.log"
  local code=${PIPESTATUS[0]}
  return $((code == 3 ? 70 : code)) # pytest's 3 is an internal error, not "more to do"
}

# Every stage of NSA against the reference at 8K tokens, a process per stage: one that loses its
# CUDA context, or the machine's time, leaves the others and every line that it had written.
ops() { # STAGES
  local stage worst=0 code pids=()
  for stage in "$@"; do
    SERIAL=1 tests test_hw_long.py -k "$stage and $([[ $dry ]] && echo 136 || echo 8192)" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    wait "$pid"; code=$?
    ((code == 0)) || worst=$code
  done
  return $worst
}

tune() {
  "$python" -m tools.tune --out "$out/tune.jsonl" --bundle "$out/plans.json" \
    --budget "$(inner)" --revision "$revision" ${dry:+--dry-run} "$@"
}

bench() { # ARGUMENTS of tools.peers
  local given=() name commit
  for name in fla sfnsa xunhao fsa lucidrains; do
    [[ -d $peers/$name ]] || continue
    given+=("--$name" "$peers/$name")
    # A folder inside another repository would get that one's commit.
    commit=$(cat "$peers/$name.commit" 2>/dev/null ||
      { [[ -e $peers/$name/.git ]] && git -C "$peers/$name" rev-parse HEAD; } 2>/dev/null)
    [[ -z $commit ]] || given+=(--commit "$name=$commit")
  done
  if [[ $dry ]]; then given=(--tiny --only nsa-neuron); fi
  "$python" -m tools.peers --own tools.own_stages:STAGES "${given[@]}" --commit \
    "nsa-neuron=$revision" --revision "$revision" --resume --out "$out/bench.jsonl" \
    --budget "$(inner)" --grace 8 "$@"
}

profile() {
  "$python" -m tools.profile_nsa --out "$out/profile.jsonl" --revision "$revision" \
    ${dry:+--dry-run} "$@"
}

# Without a GPU that takes the kernels, tests would be skipped and count as done; and which one it is
# is asked again each time.
usable() {
  sed -i '/"step": "machine", "status": "done"/d' "$out/steps.jsonl" 2>/dev/null
  step machine "$1" machine
  [[ $code != 9 ]] || { echo "the kernels cannot run here; see $out/machine.txt" >&2; exit 2; }
}

# `timeout` starts a process, so the steps run in a shell of their own.
export -f inner machine prewarm tests ops tune bench profile
export root peers out python dry revision
if [[ -z $dry && -f $out/plans.json ]]; then # tuned by an earlier run, perhaps elsewhere
  "$python" -m tools.tune --install "$out/plans.json"
fi

stages=(dense nsa slc cmp select window decode)
ab=${AB:-compressed_attention.forward select_blocks.forward selected_attention.forward
  selected_attention.dispatch sliding_window_attention.forward compressed_attention.backward_dkv
  selected_attention.backward_dq selected_attention.backward_dkv decode.score decode.attend}
ab=$(echo $ab | tr ' ' ',')

if [[ $dry ]]; then
  usable 60
  step ops-8k 600 ops window
  step profile 300 profile
  step bench-decode 400 bench --stages decode --dists random
  step bench-64k 400 bench --stages window --dists random
  step ab 300 tune
else
  usable 45
  # Not done for good: the next machine has compiled nothing.
  sed -i '/"step": "prewarm", "status": "done"/d' "$out/steps.jsonl"
  step prewarm 150 prewarm
  step ops-8k 110 ops "${stages[@]}"
  step profile 45 profile
  rivals="nsa-neuron,sdpa-cudnn,sfnsa"
  step bench-decode 60 bench --lengths 65536 --only $rivals --stages decode,dense_decode \
    --prewarm 0
  step bench-64k 140 bench --lengths 65536 --only $rivals --prewarm 0 \
    --stages nsa,dense,slc,cmp,select,cmp_select,window
  step ab 130 tune --only "$ab" --tokens 65536 --heads 64/4/192/128
  step bench-peers 120 bench --lengths 65536
  step smoke 60 tests test_hw_ops.py -k smoke
  step runtime 60 tests test_hw_runtime.py
  step tune 115 tune
  step bench-lengths 240 bench --lengths 32768,16384,8192,131072 \
    --stages dense,nsa,slc,cmp,select,cmp_select,window
  step bench-1m 45 bench --lengths 1048576 --dists random --only nsa-neuron \
    --heads 64/4/192/128 --stages slc,cmp,select,window --prewarm 0
  SERIAL=1 step long 120 tests test_hw_long.py -k "not 8192"
  step conform-bf16 200 tests test_hw_ops.py -k "every_case and bfloat16"
  step conform-fp16 200 tests test_hw_ops.py -k "every_case and -float16"
  step conform-fp32 200 tests test_hw_ops.py -k "every_case and float32"
  step sanitizer 150 tests test_hw_sanitizer.py
  step counters 100 profile --ncu
fi

echo "== $((SECONDS - started)) s; results in $out"
((failed)) && exit 1
((left)) && exit 3
exit 0
