#!/usr/bin/env bash
# `kandle bench pipeline` on a Kafka of its own. Arguments go to the command; prints its JSON.
set -euo pipefail
port=${PORT:-19492}
. "$(dirname "$0")/broker.sh"
"$kandle" bench pipeline --brokers "$server" --json "$@"
