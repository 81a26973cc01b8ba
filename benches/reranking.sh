#!/usr/bin/env bash
# Compares the cost of records with 200 documents to that of records with one: 2,000 pairs of a query and a document run
# through MODEL (make.py's `pairs`), in alternating turns. The time to load the model is subtracted. Prints a JSON line.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
kandle=${KANDLE:-$target/release/kandle}
folder=${FOLDER:-$target/bench-engine}
turns=${TURNS:-5}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
[ -d "$folder/pairs" ] || "$root/.cache/peers/bin/python3" "$root/benches/peers/make.py" "$folder" pairs >&2
python3 - "$folder/short.jsonl" "$dir" <<'PYTHON'
import json, sys
texts = [json.loads(line)["text"] for line in open(sys.argv[1])][:2000]
for name, each in ("many", 200), ("one", 1):
    with open(f"{sys.argv[2]}/{name}", "w") as out:
        for at in range(0, len(texts), each):
            # The same query for each group of 200, so that both files have the same pairs.
            out.write(json.dumps({"query": texts[at // 200], "documents": texts[at:at + each]}) + "\n")
PYTHON
: > "$dir/none"
run() { # FILE: seconds
  local began
  began=$(date +%s.%N)
  "$kandle" predict --set kafka.brokers=none:1 --set input.topics=in --set input.group=g --set input.field=/query \
    --set task.kind=reranking --set task.documents=/documents --set "model.source=${MODEL:-$folder/pairs}" \
    --set output.topic=out --set dead_letters.topic=dead --set log.level=error "$dir/$1" > "$dir/$1.out"
  awk -v a="$began" -v b="$(date +%s.%N)" 'BEGIN { printf "%.3f", b - a }'
}
run one > /dev/null
for turn in $(seq "$turns"); do
  load=$(run none); many=$(run many); one=$(run one)
  awk -v l="$load" -v m="$many" -v o="$one" 'BEGIN { printf "%.3f %.3f %.3f\n", m - l, o - l, (m - l) / (o - l) }'
done > "$dir/turns"
median() { sort -n "$dir/turns" -k "$1,$1" | awk -v c="$1" '{ v[NR] = $c } END { print v[int((NR + 1) / 2)] }'; }
printf '{"pairs": 2000, "turns": %d, "seconds_of_200_a_record": %s, "seconds_of_one_a_record": %s, "ratio": %s}\n' \
  "$turns" "$(median 1)" "$(median 2)" "$(median 3)"
