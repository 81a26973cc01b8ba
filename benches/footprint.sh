#!/usr/bin/env bash
# Measures start-up time, idle CPU and resident memory of `kandle run` with the bundled model on a real Kafka.
# Prints one JSON line.
set -euo pipefail
port=${PORT:-19392}
. "$(dirname "$0")/broker.sh"
on_exit() { kill "${daemon:-}" 2>/dev/null || true; }
create 4 in out dead
started=$(date +%s%N)
"$kandle" run --set "kafka.brokers=$server" --set input.topics=in --set input.group=footprint \
  --set input.format=text --set task.kind=text-classification --set model.source=bundled --set output.topic=out \
  --set dead_letters.topic=dead --set server.listen=127.0.0.1:0 2>"$dir/log" &
daemon=$!
until grep -q 'model loaded' "$dir/log"; do kill -0 "$daemon"; done
loaded=$(date +%s%N)
until grep -q ' assigned partitions=' "$dir/log"; do kill -0 "$daemon"; done
assigned=$(date +%s%N)
ticks() { awk '{ print $14 + $15 }' "/proc/$daemon/stat"; }
sleep 5 # so that work of the start-up does not count as idle CPU
before=$(ticks)
sleep 30
after=$(ticks)
rss=$(awk '/^VmRSS/ { print $2 }' "/proc/$daemon/status")
awk -v l=$((loaded - started)) -v a=$((assigned - started)) -v t=$((after - before)) -v hz="$(getconf CLK_TCK)" -v rss="$rss" \
  'BEGIN { printf "{\"model_loaded_seconds\": %.3f, \"assigned_seconds\": %.3f, \"idle_cpu_percent\": %.2f, \"rss_mib\": %.1f}\n",
           l / 1e9, a / 1e9, 100 * t / hz / 30, rss / 1024 }'
