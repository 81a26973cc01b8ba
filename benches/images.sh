#!/usr/bin/env bash
# Compares kandle on images with ONNX Runtime (benches/peers/images.py, to which it passes its arguments), and its
# preprocessing with Pillow's. KANDLE is the binary.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
peers=$("$root/benches/peers/venv.sh")
"$peers/bin/python" -c 'import PIL' 2> /dev/null || "$peers/bin/pip" install --quiet pillow
"$peers/bin/python" "$root/benches/peers/images.py" "${KANDLE:-$target/release/kandle}" "$target/bench-images" "$@"
