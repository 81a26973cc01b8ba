#!/usr/bin/env bash
# Measures drains on a Kafka of its own: 1,000,000 small records without a model, 20,000 tickets through the bundled
# model, and texts through make.py's minilm, compared with the rate of `bench engine`. Prints a JSON line for each.
set -euo pipefail
port=${PORT:-19592}
. "$(dirname "$0")/broker.sh"
folder=${FOLDER:-$target/bench-engine}

drain() { # NAME FILE SETTINGS…: fills a topic with the file's lines, drains it
  local name=$1 file=$2
  fill 4 "$name" "$file"
  "$kandle" drain --report "$dir/$name.json" --set "kafka.brokers=$server" --set "input.topics=$name" \
    --set "input.group=$name" --set input.field=/text --set "output.topic=$name-out" --set "dead_letters.topic=$name-dead" \
    --set server.listen=127.0.0.1:0 "${@:3}" 2> "$dir/$name.log" || { cat "$dir/$name.log" >&2; exit 1; }
}

seq 1000000 | sed 's/.*/{"text": "ticket & is here"}/' > "$dir/small"
drain small "$dir/small" --set task.kind=noop
records=$(sed -n 's/.*"records": \([0-9]*\),/\1/p' "$dir/small.json")
awk -v r="$records" -v s="$(seconds "$dir/small.log")" 'BEGIN { printf "{\"drain\": \"noop\", \"records\": %d, \"seconds\": %.2f, \"records_per_second\": %.0f}\n", r, s, r / s }'

for _ in $(seq 100); do cat "$root/demo/tickets.jsonl"; done | awk '{ sub(/"text": "/, "\"text\": \"no. " NR ": "); print }' > "$dir/tickets"
drain tickets "$dir/tickets" --set task.kind=text-classification --set model.source=bundled
records=$(sed -n 's/.*"records": \([0-9]*\),/\1/p' "$dir/tickets.json")
awk -v r="$records" -v s="$(seconds "$dir/tickets.log")" 'BEGIN { printf "{\"drain\": \"bundled\", \"records\": %d, \"seconds\": %.2f, \"records_per_second\": %.0f}\n", r, s, r / s }'

if [ -e "$folder/minilm" ]; then
  for _ in 1 2 3; do cat "$folder/mixed.jsonl"; done | # Makes all texts different, since equal ones are computed once, with letters of the vocabulary.
    awk '{ mark = ""; for (n = NR; n; n = int(n / 10)) mark = mark sprintf("%c ", 97 + n % 10)
           sub(/"text": "/, "\"text\": \"" mark); print }' > "$dir/mixed"
  engine() {
    "$kandle" bench engine --json --model "$folder/minilm" --input "$dir/mixed" 2> /dev/null |
      sed -n 's/.*"records_per_second": \([0-9.]*\).*/\1/p'
  }
  before=$(engine)
  drain mixed "$dir/mixed" --set task.kind=text-embedding --set "model.source=$folder/minilm"
  after=$(engine)
  records=$(sed -n 's/.*"records": \([0-9]*\),/\1/p' "$dir/mixed.json")
  awk -v r="$records" -v s="$(seconds "$dir/mixed.log")" -v a="$before" -v b="$after" 'BEGIN {
    printf "{\"drain\": \"minilm\", \"records\": %d, \"seconds\": %.2f, \"records_per_second\": %.1f, \"bench_engine\": %.1f, \"ratio\": %.3f}\n",
      r, s, r / s, (a + b) / 2, r / s / ((a + b) / 2) }'
fi
