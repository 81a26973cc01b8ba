# Source this with `port` set to start a Kafka that stops when the benchmark exits. Sets root, target, kandle, server and
# dir, a temporary folder. Override on_exit to stop other processes.
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

create() { # PARTITIONS TOPIC…: creates the topics as soon as the broker answers
  local partitions=$1 topic
  for topic in "${@:2}"; do
    until tool org.apache.kafka.tools.TopicCommand --bootstrap-server "$server" --create --if-not-exists \
      --topic "$topic" --partitions "$partitions" > /dev/null 2>&1; do kill -0 %1; done
  done
}

fill() { # PARTITIONS TOPIC FILE: fills the topic with the file's lines; creates the topics for predictions and dead letters
  create "$1" "$2" "$2-out" "$2-dead"
  # On a fast machine the producer queues more than the default heap holds.
  TOOL_HEAP=512m tool org.apache.kafka.tools.ConsoleProducer --bootstrap-server "$server" --topic "$2" --batch-size 16000 --timeout 20 \
    < "$3" > /dev/null
}

seconds() { # LOG: seconds of a drain from the assignment to the end, without the time to join the group
  date -f <(sed -n 's/^\([^ ]*Z\).* assigned partitions.*/\1/p; s/^\([^ ]*Z\).* drained: .*/\1/p' "$1") +%s.%N |
    awk 'NR == 1 { first = $1 } { last = $1 } END { print last - first }'
}
