#!/usr/bin/env bash
# One session on a machine with a GPU: builds, tests, checks, tunes, times and sanitizes, each part
# with a time limit and its log under OUT, whatever became of the part before. A page at the end
# says what came of each. In ten minutes fit: build, test, check; tune, sanitize; launches, bench.
#
#   OUT=folder PARTS="build test check" LIMITS="test=300 check=120" PYTHON=python3 bench/gpu.sh
#
# The part launches compares launches and ships the fastest before all else, those of
# bench/questions.txt or others: LAUNCHES="'lift_blur 16 any ROWS=4,8,16' --images 16".
set -u
cd "$(dirname "$0")/.." || exit 2

OUT=${OUT:-bench/results/session}
PYTHON=${PYTHON:-.venv/bin/python}
WORKERS=${WORKERS:-8}
LAUNCHES=${LAUNCHES:-@bench/questions.txt --images 128 --images 16 --seconds 130}
# A CUDA error ends its process for good, so every group has one of its own; the dearest come last.
bench_group() { # folder, seconds, file, expression
  timeout "$2" "$PYTHON" -m pytest "bench/test_bench_$3.py" -k "not triton-compile${4:+ and $4}" -v \
    --device cuda --must --results "$1"
}
bench_groups() {
  local code=0 group file words warm
  # What is compiled is kept on disk. All is compiled at once first, but for what times it meanwhile.
  warm=$(mktemp -d)
  for group in conv_attention "model EqCvT and training" "model EqCvT and inference" mlp_block \
    lift "model stage"; do
    file=${group%% *} words=${group#"$file"}
    bench_group "$warm" $((LIMIT / 3)) "$file" "not step${words:+ and $words}" &>/dev/null &
  done
  wait
  for group in conv_attention "model EqCvT and not step" mlp_block lift "model stage" "model step"; do
    file=${group%% *} words=${group#"$file"}
    bench_group "$OUT" $((LIMIT > SECONDS + 9 ? LIMIT - SECONDS - 8 : 1)) "$file" "$words" || code=1
  done
  return $code
}
export -f bench_group bench_groups
declare -A limits=([launches]=200 [build]=150 [test]=270 [check]=160 [tune]=240 [bench]=390 [sanitize]=140)
declare -A commands=(
  [launches]="$PYTHON -m bench.launch_times $LAUNCHES --jobs $WORKERS --ship --out \"\$OUT/launches.json\""
  [build]="EQCVT_NATIVE=1 EQCVT_CUDA=1 $PYTHON setup.py build_ext --inplace"
  [test]="EQCVT_REQUIRE=cuda $PYTHON -m pytest -p no:benchmark -m gpu -n $WORKERS --dist worksteal tests"
  [check]="$PYTHON -m eqcvt tune --check-only --jobs $WORKERS --out \"\$OUT/tuned.json\""
  [tune]="$PYTHON -m eqcvt tune --jobs $WORKERS --minutes 2.5 --out \"\$OUT/tuned.json\""
  [bench]=bench_groups
  [sanitize]="$PYTHON -m bench.sanitize --jobs $WORKERS --out \"\$OUT/sanitizer.txt\""
)
parts=${PARTS:-build test check tune bench sanitize}

for part in $parts; do
  if [ -z "${commands[$part]:-}" ]; then
    echo "PARTS names $part, which is none of launches build test check tune bench sanitize" >&2
    exit 2
  fi
done
for limit in ${LIMITS:-}; do
  if [ -z "${limits[${limit%%=*}]:-}" ] || ! [[ ${limit#*=} =~ ^[0-9]+$ ]]; then
    echo "LIMITS must be a list such as \"test=300 check=120\" in seconds, got $limit" >&2
    exit 2
  fi
  limits[${limit%%=*}]=${limit#*=}
done

needed='import sys, bench.models; from eqcvt.convert import _escnn; sys.exit(_escnn.install())'
if [[ " $parts " == *" bench "* ]] && ! "$PYTHON" -c "$needed"; then
  echo "the part bench cannot be run by $PYTHON, for the reason above" >&2
  exit 2
fi

mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
export OUT PYTHON PYTHONUNBUFFERED=1
page=$OUT/summary.txt
{
  date -u
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>&1 | head -n 4
  "$PYTHON" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)' 2>&1 | tail -n 1
} >"$page"
failed=0
for part in $parts; do
  echo "$part: ${commands[$part]}"
  start=$SECONDS
  # What was tuned is used from then on.
  if [ "$part" != check ] && [ "$part" != tune ]; then
    EQCVT_TUNED=none # and nothing is checked while something is timed
    [ -f "$OUT/tuned.json" ] && EQCVT_TUNED=$OUT/tuned.json
    export EQCVT_TUNED
  fi
  LIMIT=${limits[$part]} timeout -k 10 "${limits[$part]}" bash -c "${commands[$part]}" >"$OUT/$part.log" 2>&1
  code=$?
  result="ok"
  if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
    result="stopped after its ${limits[$part]} s"
  elif [ "$code" -ne 0 ]; then
    result="failed with $code"
  fi
  [ "$code" -eq 0 ] || failed=1
  {
    printf '\n%s: %s, %d s, %s\n' "$part" "$result" $((SECONDS - start)) "$OUT/$part.log"
    grep -v '^[[:space:]]*$' "$OUT/$part.log" | tail -n 5 | cut -c 1-160 | sed 's/^/  /'
    # Whatever became of the rest.
    [ "$part" = bench ] && compgen -G "$OUT/*.csv" >/dev/null && "$PYTHON" -m bench.must "$OUT"/*.csv
  } | tee -a "$page"
done
echo
echo "======== $page"
cat "$page"
exit $failed
