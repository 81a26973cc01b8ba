#!/usr/bin/env bash
# Drains rows of a table through a classifier of 300 trees over 20 columns and, in turns, through noop, on a Kafka of its own. Both
# read the rows as JSON. ROWS and ROUNDS are optional. Prints records/s and the ratio of each round.
set -euo pipefail
port=${PORT:-19693}
. "$(dirname "$0")/broker.sh"
peers=$("$root/benches/peers/venv.sh")
rows=${ROWS:-1000000}
"$peers/bin/python" "$root/benches/peers/table.py" "$dir" "$rows"
fill 4 table "$dir/rows.jsonl"
columns=$(seq 0 19 | sed 's|.*|/c&|' | paste -sd ,)
echo "task: { kind: tensor, as: classification, inputs: { x: [$columns] } }" > "$dir/trees.yaml"
echo "task: { kind: noop }" > "$dir/noop.yaml"

drain() { # TASK NAME SETTINGS…: drains the topic; prints records/s
  local task=$1
  shift
  "$kandle" drain -c "$dir/$task.yaml" --report "$dir/$1.json" --set "kafka.brokers=$server" --set input.topics=table --set "input.group=$1" \
    --set output.topic=table-out --set dead_letters.topic=table-dead --set server.listen=127.0.0.1:0 \
    --set window.max_records=4096 "${@:2}" 2> "$dir/$1.log" || { cat "$dir/$1.log" >&2; exit 1; }
  awk -v r="$rows" -v s="$(seconds "$dir/$1.log")" 'BEGIN { printf "%.0f", r / s }'
}

for round in $(seq "${ROUNDS:-3}"); do
  noop=$(drain noop "noop-$round" --set input.field=/id)
  trees=$(drain trees "trees-$round" --set "model.source=$dir/model.onnx")
  awk -v n="$noop" -v t="$trees" -v i="$round" \
    'BEGIN { printf "round %d: noop %d records/s, 300 trees %d records/s, ratio %.2f\n", i, n, t, t / n }'
done
