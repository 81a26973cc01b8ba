#!/usr/bin/env bash
# Compares two builds of kandle, alternating on this machine: engine (f32, int8), pipeline without a model, start-up and
# memory. Usage: benches/versions.sh OLD NEW. FOLDER has make.py's models and texts (benches/engine.sh), ROUNDS defaults
# to 5. Prints the medians of each measure and the median of its ratios within rounds, NEW ÷ OLD.
set -euo pipefail
old=$1 new=$2
port=${PORT:-19692}
. "$(dirname "$0")/broker.sh"
folder=${FOLDER:-$target/bench-engine}
rounds=${ROUNDS:-5}

number() { sed -n "s/.*\"$1\": *\([0-9.]*\).*/\1/p" | head -1; }
engine() { # BINARY DTYPE: texts a second
  "$1" bench engine --json --model "$folder/minilm" --input "$folder/mixed.jsonl" --dtype "$2" 2> /dev/null | number records_per_second
}
pipelines() { # BINARY: records a second under at_least_once and exactly_once
  "$1" bench pipeline --brokers "$server" --json --records 500000 --rounds 1 > "$dir/pipeline.json" 2> /dev/null
  echo "$(number at_least_once < "$dir/pipeline.json") $(number exactly_once < "$dir/pipeline.json")"
}
start_up() { # BINARY: seconds to load BERT-base and predict one text, and the most resident memory in KiB
  local before
  before=$(date +%s.%N)
  echo '{"text": "one"}' | "$1" predict --set kafka.brokers=none:1 --set input.topics=a --set input.group=b \
    --set input.field=/text --set task.kind=text-embedding --set "model.source=$folder/base" --set output.topic=c \
    --set dead_letters.topic=d > /dev/null 2>&1 &
  local pid=$! peak=0 now
  while now=$(sed -n 's/^VmHWM:[[:space:]]*\([0-9]*\) kB/\1/p' "/proc/$pid/status" 2> /dev/null) && [ -n "$now" ]; do peak=$now; sleep 0.02; done
  wait $pid
  echo "$(date +%s.%N) $before $peak" | awk '{ print $1 - $2, $3 }'
}

create 1 ready
for round in $(seq "$rounds"); do
  for side in old new; do
    binary=${!side}
    echo "engine_f32 $side $round $(engine "$binary" f32)"
    echo "engine_int8 $side $round $(engine "$binary" int8)"
    read -r least exactly < <(pipelines "$binary")
    echo "at_least_once $side $round $least"
    echo "exactly_once $side $round $exactly"
    read -r seconds peak < <(start_up "$binary")
    echo "start_up_seconds $side $round $seconds"
    echo "peak_kib $side $round $peak"
  done
done | tee "$dir/measured" >&2
awk '
  function median(list, count,   i, j, x) {
    for (i = 2; i <= count; i++) { x = list[i]; for (j = i - 1; j > 0 && list[j] > x; j--) list[j + 1] = list[j]; list[j + 1] = x }
    return count % 2 ? list[(count + 1) / 2] : (list[count / 2] + list[count / 2 + 1]) / 2
  }
  { value[$1, $2, $3] = $4; if (!($1 in seen)) { seen[$1] = 1; names[++kinds] = $1 } if ($3 > rounds) rounds = $3 }
  END {
    for (k = 1; k <= kinds; k++) {
      for (r = 1; r <= rounds; r++) { o[r] = value[names[k], "old", r]; n[r] = value[names[k], "new", r]; q[r] = n[r] / o[r] }
      printf "%-17s old %.2f new %.2f ratio %.3f\n", names[k], median(o, rounds), median(n, rounds), median(q, rounds)
    }
  }' "$dir/measured"
