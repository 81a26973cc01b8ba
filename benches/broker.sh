# Sourced by the benchmarks that want a Kafka of their own, with `port` set: starts it, and ends it when they exit.
# Sets root, target, kandle, server and dir, a folder that goes with it. What else has to end is on_exit's.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
kandle=${KANDLE:-$target/release/kandle}
server="127.0.0.1:$port"
dir=$(mktemp -d)
mkfifo "$dir/hold"
"$root/tests/support/kafka.sh" run "$dir/kafka" "$port" <"$dir/hold" &
exec 3>"$dir/hold"
on_exit() { :; }
trap 'on_exit; exec 3>&-; wait; rm -rf "$dir"' EXIT

tool() { "$root/tests/support/kafka.sh" tool "$@"; }

create() { # PARTITIONS TOPIC…: once the broker answers
  local partitions=$1 topic
  for topic in "${@:2}"; do
    until tool org.apache.kafka.tools.TopicCommand --bootstrap-server "$server" --create --if-not-exists \
      --topic "$topic" --partitions "$partitions" > /dev/null 2>&1; do kill -0 %1; done
  done
}

fill() { # PARTITIONS TOPIC FILE: the topic with the file's lines, and those for its predictions and dead letters
  create "$1" "$2" "$2-out" "$2-dead"
  # A fast machine queues more than the usual heap holds.
  TOOL_HEAP=512m tool org.apache.kafka.tools.ConsoleProducer --bootstrap-server "$server" --topic "$2" --batch-size 16000 --timeout 20 \
    < "$3" > /dev/null
}

seconds() { # LOG: of a drain, from the assignment to the end; joining a new group takes its time
  date -f <(sed -n 's/^\([^ ]*Z\).* assigned partitions.*/\1/p; s/^\([^ ]*Z\).* drained: .*/\1/p' "$1") +%s.%N |
    awk 'NR == 1 { first = $1 } { last = $1 } END { print last - first }'
}
