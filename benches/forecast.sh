#!/usr/bin/env bash
# Compares kandle's forecasts with the chronos package on this machine's CPU (benches/peers/forecast.py, to which it passes its
# arguments). The package comes from PyPI.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
peers=$("$root/benches/peers/venv.sh")
"$peers/bin/python" -c 'import chronos' 2> /dev/null || "$peers/bin/pip" install --quiet chronos-forecasting==2.3.2
"$peers/bin/python" "$root/benches/peers/forecast.py" "${KANDLE:-$target/release/kandle}" "$target/bench-forecast" "$@"
