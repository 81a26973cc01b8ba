#!/usr/bin/env bash
# Compares kandle with ONNX Runtime (f32) on encoders other than BERT, in the shapes of MiniLM-L6 and BERT-base, and prints the
# share of the time that DeBERTa's attention takes. ROUNDS, MODELS and TEXTS select what runs.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
peers=$("$root/benches/peers/venv.sh")
folder=$target/bench-encoders
models=${MODELS:-albert-tiny,electra-tiny,mpnet-tiny,jina-tiny,deberta-tiny,albert,electra,mpnet,jina,deberta}

missing=()
for model in ${models//,/ }; do
  [ -e "$folder/$model/model.safetensors" ] || missing+=("$model")
done
[ ${#missing[@]} = 0 ] || "$peers/bin/python" "$root/benches/peers/make.py" "$folder" "${missing[@]}"
"$peers/bin/python" "$root/benches/peers/compare.py" "$target/release/kandle" "$folder" --threads "$(nproc)" \
  --rounds "${ROUNDS:-3}" --models "$models" --texts "${TEXTS:-mixed}" --engines "onnxruntime f32" --dtypes f32 \
  --output "$folder/results.json"
