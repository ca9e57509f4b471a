#!/usr/bin/env bash
# Runs on a machine with a GPU what `./dev gpu-test` staged beside this script.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: run [PHASE…]     without a phase: --start --suite --proofs
  --start      seconds to the first result with an empty and with a full kernel cache
  --suite      every operation against the CPU, on the GPU
  --proofs     the whole model, beside transformers and PEFT, which this machine's Python needs
  --sanitize   the suite under compute-sanitizer: memcheck, then racecheck
  --bench      F1 to F4 and D1 to D4; the figures go to figures.jsonl
  --peft       the peer, PEFT, measured likewise; the figures go to peft.jsonl
  --quick      the measurements cut short, to see that they run
  --cpu        no GPU: those parts of suite and proofs that need none
environment: FILTER (tests whose names hold it), OUT (folder for logs and figures; ./gpu-results),
             LOQUETIER_STAGE (where to unpack; a temporary folder), BENCH (what follows `bench`
             in place of `all …`; the word CHATS stands for the staged chats)
TEXT
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${OUT:-$PWD/gpu-results}
stage=${LOQUETIER_STAGE:-/tmp/loquetier-stage}
phases=()
quick=()
device=cuda
while [ $# -gt 0 ]; do
    case $1 in
        --start | --suite | --proofs | --sanitize | --bench | --peft) phases+=("${1#--}") ;;
        --quick) quick=(--quick) ;;
        --cpu) device=cpu ;;
        --help | -h) usage && exit 0 ;;
        *)
            usage >&2
            exit 1
            ;;
    esac
    shift
done
[ ${#phases[@]} -gt 0 ] || phases=(start suite proofs)

mkdir -p "$out" "$stage"
if [ ! -e "$stage/done" ] || [ "$here/stage.tar.gz" -nt "$stage/done" ]; then
    tar -C "$stage" -xzf "$here/stage.tar.gz"
    touch "$stage/done"
fi
bin=$stage/bin
LOQUETIER_COMMIT=$(cat "$stage/commit")
export LOQUETIER_COMMIT LOQUETIER_SOURCE=$stage/source
export LOQUETIER_KERNEL_CACHE=$stage/kernels LOQUETIER_DEVICE=$device
echo "commit $LOQUETIER_COMMIT, $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader \
    2>/dev/null || echo 'no GPU')"

start() {
    local cache name before
    cache=$(mktemp -d)
    for name in cold warm; do
        before=$(date +%s.%N)
        LOQUETIER_KERNEL_CACHE=$cache "$bin/loquetier" bench load --repeats 1
        echo "$name start: $(date +%s.%N | awk -v b="$before" '{ printf "%.2f", $1 - b }') s"
    done
    rm -rf "$cache"
}

suite() {
    "$bin/device_suite" --include-ignored "${FILTER-$device}"
}

proofs() {
    local made=$stage/whole
    if [ "$device" = cpu ]; then
        "$bin/proofs" "${FILTER-}"
        return
    fi
    [ -d "$made" ] || python3 -B "$LOQUETIER_SOURCE/worker/tests/whole/make.py" "$made"
    LOQUETIER_WHOLE_MODEL=$made "$bin/proofs" --include-ignored --nocapture "${FILTER-whole_model}"
}

sanitize() {
    echo "-- memcheck"
    sanitizer memcheck
    # A kernel takes seconds under racecheck. cuBLASLt's are not ours to check.
    echo "-- racecheck"
    export LOQUETIER_CASES=4
    sanitizer racecheck --skip linear:: --skip draws_follow --skip chunks
}

sanitizer() {
    local tool=$1
    shift
    compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 \
        "$bin/device_suite" --include-ignored "${FILTER-cuda::}" --test-threads 1 "$@"
}

bench() {
    local json=(--json "$out/figures.jsonl")
    [ ${#quick[@]} -eq 0 ] || json=()
    # shellcheck disable=SC2206  # words of a command line
    local what=(${BENCH:-all --random-weights llama3-8b --data CHATS})
    what=("${what[@]/#CHATS/$(chats)}")
    "$bin/loquetier" bench "${what[@]}" "${json[@]}" "${quick[@]}"
}

peft() {
    python3 -B "$LOQUETIER_SOURCE/bench/peft.py" --data "$(chats)" \
        --tokenizer "$LOQUETIER_SOURCE/demo/base" --json "$out/peft.jsonl" "${quick[@]}"
}

status=0
for phase in "${phases[@]}"; do
    echo "== $phase"
    before=$SECONDS
    # A subshell of its own, not in a condition: it must stop at its first failure.
    set +e
    (
        set -e
        "$phase"
    ) 2>&1 | tee "$out/$phase.log"
    [ "${PIPESTATUS[0]}" -eq 0 ] || { status=1 && echo "== $phase FAILED"; }
    set -e
    echo "== $phase: $((SECONDS - before)) s"
done
cat "$out"/*.log | awk '/^test result: / { passed += $4; failed += $6 }
    END { printf "%d passed, %d failed\n", passed, failed }'
exit "$status"
