#!/usr/bin/env bash
# Runs `kandle bench latency` on a Kafka of its own: 20 records per second through MODEL (make.py's minilm), with windows
# that wait 10 ms. Passes its arguments to the command and prints the command's JSON.
set -euo pipefail
port=${PORT:-19792}
. "$(dirname "$0")/broker.sh"
folder=${FOLDER:-$target/bench-engine}
create 1 ready
"$kandle" bench latency --brokers "$server" --input "${INPUT:-$folder/short.jsonl}" --model "${MODEL:-$folder/minilm}" --json \
  --set window.max_wait=10ms "$@"
