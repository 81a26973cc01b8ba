#!/usr/bin/env bash
# Measures `window.max_work` with a slow model, on a Kafka of its own: MODEL (make.py's base) over texts of 250 tokens, two
# lanes, defaults. Prints a JSON line: seconds from the assignment to the first prediction; seconds from SIGTERM to the
# exit; predictions repeated after kill -9, in seconds of work; records/s of a drain, compared in alternating turns with
# one whose windows have no limit on work.
set -euo pipefail
port=${PORT:-19692}
. "$(dirname "$0")/broker.sh"
folder=${FOLDER:-$target/bench-engine}
model=${MODEL:-$folder/base}
turns=${TURNS:-2}
on_exit() { kill "${pid:-}" 2>/dev/null || true; }

settings() { # TOPIC GROUP
  echo --set "kafka.brokers=$server" --set "input.topics=$1" --set "input.group=$2" --set input.field=/text \
    --set "output.topic=$1-out" --set "dead_letters.topic=$1-dead" --set server.listen=127.0.0.1:0 \
    --set task.kind=text-embedding --set "model.source=$model" --set batch.lanes=2 --set input.properties.session.timeout.ms=6000
}

predicted() { # LOG: number of records with a prediction, from the metrics
  local address
  address=$(sed -n 's/.*admin server listens address=//p' "$1" | head -1)
  [ -n "$address" ] || { echo 0; return; }
  curl -s -m 2 "http://$address/metrics" | awk '/^kandle_records_total.*outcome="predicted"/ { n += $2 } END { print n + 0 }'
}

start() { # LOG TOPIC GROUP: sets pid
  # shellcheck disable=SC2046
  "$kandle" run $(settings "$2" "$3") 2> "$1" &
  pid=$!
}

await() { # LOG COUNT
  until [ "$(predicted "$1")" -ge "$2" ]; do kill -0 "$pid"; done
}

elapsed() { awk -v a="$1" -v b="$2" 'BEGIN { printf "%.2f", b - a }'; }

# Makes all texts different, since equal ones are computed once.
for mark in $(echo a b c d e f | cut -d' ' -f "-${TIMES:-6}"); do sed "s/\"text\": \"/&$mark /" "$folder/long.jsonl"; done > "$dir/texts"
total=$(wc -l < "$dir/texts")
fill 1 windows "$dir/texts"

start "$dir/first.log" windows windows
await "$dir/first.log" 1
now=$(date +%s.%N)
assigned=$(date -d "$(sed -n 's/^\([^ ]*Z\).* assigned partitions.*/\1/p' "$dir/first.log" | head -1)" +%s.%N)
first=$(elapsed "$assigned" "$now")
await "$dir/first.log" 20
now=$(date +%s.%N)
kill -TERM "$pid"; wait "$pid"
stop=$(elapsed "$now" "$(date +%s.%N)")

start "$dir/second.log" windows windows
await "$dir/second.log" 30
kill -9 "$pid"; wait "$pid" || true
start "$dir/third.log" windows windows
until [ "$(tool org.apache.kafka.tools.consumer.group.ConsumerGroupCommand --bootstrap-server "$server" --describe \
  --group windows 2>/dev/null | awk '$2 == "windows" { print $6 }')" = 0 ]; do kill -0 "$pid"; done
kill -TERM "$pid"; wait "$pid"
tool org.apache.kafka.tools.consumer.ConsoleConsumer --bootstrap-server "$server" --topic windows-out --from-beginning \
  --timeout-ms 10000 --property print.headers=true --property print.value=false 2>/dev/null |
  grep -o 'kandle-source:[^,]*' | sort > "$dir/sources"
repeated=$(( $(wc -l < "$dir/sources") - $(uniq "$dir/sources" | wc -l) ))

drain() { # GROUP SETTINGS…: records/s from the assignment to the end
  # shellcheck disable=SC2046
  "$kandle" drain $(settings windows "$1") "${@:2}" 2> "$dir/drain.log" || { cat "$dir/drain.log" >&2; exit 1; }
  seconds "$dir/drain.log" | awk -v r="$total" '{ print r / $1 }'
}

for turn in $(seq "$turns"); do
  echo "$(drain "short-$turn") $(drain "long-$turn" --set window.max_work=1h)"
done > "$dir/turns"
awk -v first="$first" -v stop="$stop" -v repeated="$repeated" -v unique="$(uniq "$dir/sources" | wc -l)" -v total="$total" '
  { ratio[NR] = $1 / $2; rate += $1 }
  END { rate /= NR; for (i = 1; i <= NR; i++) ratios = ratios (i > 1 ? ", " : "") sprintf("%.3f", ratio[i])
    printf "{\"first_prediction_seconds\": %s, \"stop_seconds\": %s, \"repeated\": %d, \"repeated_seconds\": %.2f, \"predicted\": %d, \"of\": %d, \"records_per_second\": %.1f, \"to_long_windows\": [%s]}\n",
      first, stop, repeated, repeated / rate, unique, total, rate, ratios }' "$dir/turns"
