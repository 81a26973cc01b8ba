#!/usr/bin/env bash
# `kandle bench pipeline` on a Kafka of its own. Arguments go to the command; prints its JSON.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
kandle=${KANDLE:-${CARGO_TARGET_DIR:-$root/target}/release/kandle}
dir=$(mktemp -d)
port=${PORT:-19492}
mkfifo "$dir/hold"
"$root/tests/support/kafka.sh" run "$dir/kafka" "$port" <"$dir/hold" &
exec 3>"$dir/hold"
trap 'exec 3>&-; wait; rm -rf "$dir"' EXIT
"$kandle" bench pipeline --brokers "127.0.0.1:$port" --json "$@"
