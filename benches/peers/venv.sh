#!/usr/bin/env bash
# Prints the directory of a Python environment with the engines to compare with; makes it first if it is not there.
set -euo pipefail
peers=$(cd "$(dirname "$0")/../.." && pwd)/.cache/peers
if [ ! -e "$peers/.complete" ]; then
  "${PYTHON:-python3}" -m venv "$peers" >&2
  "$peers/bin/pip" install -q torch sentence-transformers transformers sentencepiece onnx onnxruntime openvino numpy matplotlib >&2
  touch "$peers/.complete"
fi
echo "$peers"
