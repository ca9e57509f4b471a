#!/usr/bin/env bash
# Measures this build and PEFT on the same machine, one after the other, and prints the ratios.
#   bench/compare.sh DATA.jsonl [--compile]     environment: LOQUETIER (binary), PYTHON, OUT
set -euo pipefail

[ $# -ge 1 ] || {
    sed -n '2,3s/^# *//p' "$0" >&2
    exit 1
}
data=$1
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
binary=${LOQUETIER:-loquetier}
out=${OUT:-$(mktemp -d)}
mkdir -p "$out"

"$binary" bench all --random-weights llama3-8b --data "$data" --json "$out/figures.jsonl"
"${PYTHON:-python3}" -B "$root/bench/peft.py" --data "$data" --tokenizer "$root/demo/base" \
    --json "$out/peft.jsonl" "$@"
"${PYTHON:-python3}" -B "$root/bench/ratios.py" "$out/figures.jsonl" "$out/peft.jsonl"
