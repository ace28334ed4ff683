#!/usr/bin/env bash
# Sets up .venv and runs every test. The last line of the output is the total:
#   N passed, N failed
# Exit code 0 only if nothing failed. Works from any folder, without a terminal, from a fresh clone.
#
#   JOBS=1 bash scripts/test.sh     one group after the other (default: one per core, at most 4)
set -u -o pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if ! set_up; then
    echo "the environment could not be made; no test has run"
    echo "0 passed, 1 failed"
    exit 1
fi

CORES=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
JOBS=${JOBS:-$((CORES < 4 ? CORES : 4))}
RESULTS=$(mktemp -d)
trap 'rm -rf "$RESULTS"' EXIT

# name, backend (- for none), what pytest is given. The long ones first, so that the cores stay busy.
GROUPS_OF_TESTS=(
    "runs - tests/cross/runs"
    "neutral - tests/neutral"
    "cross - tests/cross --ignore tests/cross/runs"
    "torch - tests/torch"
    "backend-mindspore mindspore tests/backend"
    "backend-torch torch tests/backend"
    "backend-paddle paddle tests/backend"
    "mindspore - tests/mindspore"
    "paddle - tests/paddle"
)

# Runs a command, puts its name before each line it prints, and keeps its exit code.
run_group() {
    local name=$1 started=$SECONDS
    shift
    echo "[$name] start"
    "$@" 2>&1 </dev/null | while IFS= read -r line; do echo "[$name] $line"; done
    local code=${PIPESTATUS[0]}
    echo "$code" >"$RESULTS/$name.code"
    echo "[$name] exit code $code after $((SECONDS - started)) s"
}

run_pytest() {
    local name=$1 backend=$2
    shift 2
    local -a environment=()
    [ "$backend" = - ] || environment=("UNILLAVA_BACKEND=$backend")
    run_group "$name" env "${environment[@]+"${environment[@]}"}" "$PY" -m pytest "$@" \
        --quiet --color=no --junitxml="$RESULTS/$name.xml" -o cache_dir="$RESULTS/cache-$name"
}

NAMES=(ruff-check ruff-format)
run_group ruff-check "$PY" -m ruff check --no-cache .
run_group ruff-format "$PY" -m ruff format --no-cache --check --quiet .
for group in "${GROUPS_OF_TESTS[@]}"; do
    while [ "$(jobs -pr | wc -l)" -ge "$JOBS" ]; do sleep 1; done
    read -r -a words <<<"$group"
    NAMES+=("${words[0]}")
    run_pytest "${words[@]}" &
done
wait

"$PY" scripts/total.py "$RESULTS" "${NAMES[@]}"
