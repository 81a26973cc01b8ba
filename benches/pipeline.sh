#!/usr/bin/env bash
# Runs `kandle bench pipeline` on a Kafka of its own. Passes its arguments to the command and prints the command's JSON.
set -euo pipefail
port=${PORT:-19492}
. "$(dirname "$0")/broker.sh"
"$kandle" bench pipeline --brokers "$server" --json "$@"
