#!/usr/bin/env bash
# Puts into .stage/ all that a machine with a GPU but without Rust needs: `stage.tar.gz`, and `run`,
# the one command to run there. Small enough to be carried (about 35 MB).
#   tests/gpu/stage.sh [--release]   the binary as users build it; without, as developers do
# GSM8K names the chats that fine-tuning is measured on (JSONL); without, only --quick can be run.
# NVRTC_FOLDER may name where libnvrtc lies: then machine code for sm_90a travels along.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

target=${CARGO_TARGET_DIR:-target}
profile=debug
stage=.stage
options=()
case ${1:-} in
    --release)
        profile=release
        options=(--release)
        ;;
    '') ;;
    *)
        echo "stage.sh: unknown argument: $1" >&2
        exit 1
        ;;
esac

# Prints the path of each test binary of that name, built.
test_binaries() {
    cargo test --workspace --no-run "$@" 2>&1 | tee /dev/stderr |
        sed -n 's/^ *Executable.*(\(.*\))$/\1/p'
}

rm -rf "$stage"
mkdir -p "$stage/tree/bin" "$stage/tree/data"
cargo build --workspace "${options[@]}" --bin loquetier
strip -o "$stage/tree/bin/loquetier" "$target/$profile/loquetier"
test_binaries --test device_suite --test proofs | while read -r path; do
    name=$(basename "$path")
    strip -o "$stage/tree/bin/${name%-*}" "$path"
done

# Files that tests and measurements read, where they lie in the repository.
for path in worker/tests/golden worker/tests/whole demo/base demo/data bench; do
    [ -e "$path" ] || continue
    mkdir -p "$stage/tree/source/$(dirname "$path")"
    cp -r "$path" "$stage/tree/source/$path"
done
if [ -n "${GSM8K:-}" ]; then
    cp "$GSM8K" "$stage/tree/data/chats.jsonl"
else
    echo "stage.sh: GSM8K=FILE names no chats: --bench and --peft will only run --quick" >&2
fi
git describe --always --dirty --abbrev=10 >"$stage/tree/commit"
if [ -n "${NVRTC_FOLDER:-}" ]; then
    LD_LIBRARY_PATH=$NVRTC_FOLDER "$stage/tree/bin/loquetier" \
        kernels compile --arch sm_90a --out "$stage/tree/kernels"
fi

cp tests/gpu/run.sh "$stage/run"
tar -C "$stage/tree" -czf "$stage/stage.tar.gz" .
rm -rf "$stage/tree"
du -h "$stage"/*
echo "carry $stage to the machine and run there: $stage/run"
