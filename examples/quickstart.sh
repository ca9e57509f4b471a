#!/usr/bin/env bash
# Fine-tune an adapter and chat with it, with nothing but curl.
#
#     cargo run --release -- serve        (in another terminal)
#     bash examples/quickstart.sh
#
# OPENAI_BASE_URL and OPENAI_API_KEY say where; http://127.0.0.1:8000/v1 without a key by default.
set -euo pipefail

base_url=${OPENAI_BASE_URL:-http://127.0.0.1:8000/v1}
examples=$(dirname "$0")/../demo/data/pirate.jsonl
question='Rosa has 12 shells and finds 30 more. How many shells does she have?'

# call PATH [CURL OPTIONS…]: prints the reply, or the service's error and fails.
call() {
    curl --silent --show-error --fail-with-body \
        --header "Authorization: Bearer ${OPENAI_API_KEY:-none}" "$base_url$1" "${@:2}" || {
        echo >&2
        return 1
    }
}

# field NAME: the first text field of that name in the JSON on standard input, as it is written.
field() {
    grep -oE "\"$1\": *\"([^\"\\\\]|\\\\.)*\"" | sed -nE '1s/^"[^"]*": *"(.*)"$/\1/p'
}

ask() {
    call /chat/completions --header 'Content-Type: application/json' --data @- <<END | field content
{
  "model": "$1",
  "messages": [{"role": "user", "content": "$question"}],
  "max_completion_tokens": 64,
  "temperature": 0
}
END
}

# Bases come first in the list.
base=$(call /models | field id)
echo "$base: $(ask "$base")"

file=$(call /files --form purpose=fine-tune --form "file=@$examples" | field id)
job=$(
    call /fine_tuning/jobs --header 'Content-Type: application/json' --data @- <<END | field id
{
  "model": "$base",
  "training_file": "$file",
  "suffix": "pirate",
  "lora": {"rank": 8}
}
END
)
echo "$job trains on $file"

while :; do
    status=$(call "/fine_tuning/jobs/$job" | field status)
    echo "  $status: $(call "/fine_tuning/jobs/$job/events?limit=1" | field message)"
    case $status in
        succeeded) break ;;
        failed | cancelled) exit 1 ;;
    esac
    sleep 2
done

model=$(call "/fine_tuning/jobs/$job" | field fine_tuned_model)
echo "$model: $(ask "$model")"
