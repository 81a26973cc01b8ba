#!/usr/bin/env bash
# How many of the backend tests that the package onnx carries pass with the task tensor. Prints a line in Markdown for each set, and
# why the others fail. The test is `outputs_of_other_models` in src/task/tensor/golden.rs; CARGO_FLAGS are for the build.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
peers=$("$root/benches/peers/venv.sh")
folder=$target/bench-onnx
"$peers/bin/python" "$root/benches/peers/onnx_backend.py" "$folder"
version=$("$peers/bin/python" -c 'import onnx; print(onnx.__version__)')
echo "| backend tests of onnx $version | pass | fail |"
echo '|---|---|---|'
for set in light simple pytorch-converted pytorch-operator; do
  # shellcheck disable=SC2086
  KANDLE_ONNX_MODELS=$folder/$set cargo test --quiet ${CARGO_FLAGS:-} --lib -- --ignored --nocapture outputs_of_other_models \
    > "$folder/$set.log" 2> "$folder/$set.err" || { tail -20 "$folder/$set.err" >&2; exit 1; }
  passed=$(sed -n 's/.*PASSED \([0-9]* of [0-9]*\).*/\1/p' "$folder/$set.log")
  failed=$(sed -n 's/.*FAILED \([^:]*\): .*/\1/p' "$folder/$set.log" | paste -sd ' ')
  echo "| $set | $passed | $failed |"
done
echo
sed -n 's/.*\(FAILED .*\)/\1/p' "$folder"/*.log | cut -c1-300
