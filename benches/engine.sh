#!/usr/bin/env bash
# Compares kandle's engine with sentence-transformers, ONNX Runtime and OpenVINO on this machine's CPU, and its kernels
# with the gemm crate. ROUNDS, MODELS and TEXTS select what runs; the default takes half an hour. If TEI is set to the
# path of text-embeddings-inference's router (benches/peers/tei.sh), that is compared too.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
peers=$("$root/benches/peers/venv.sh")
folder=$target/bench-engine

[ -e "$folder/base/model.safetensors" ] || "$peers/bin/python" "$root/benches/peers/make.py" "$folder"
"$peers/bin/python" "$root/benches/peers/compare.py" "$target/release/kandle" "$folder" --threads "$(nproc)" \
  --rounds "${ROUNDS:-3}" --models "${MODELS:-minilm,base}" --texts "${TEXTS:-short,long,mixed}" \
  --output "$folder/results.json" --plot "$root/benches/engine.svg"
tokens() { # TEXTS THREADS: tokens/s
  "$target/release/kandle" bench engine --json --model "$folder/minilm" --input "$folder/$1.jsonl" --threads "$2" 2> /dev/null |
    sed -n 's/.*"tokens_per_second": \([0-9]*\).*/\1/p'
}
echo
for round in 1 2 3; do
  echo "round $round: mixed $(tokens mixed "$(nproc)") tokens/s, all of one length $(tokens equal "$(nproc)"), mixed on one core $(tokens mixed 1)"
done
cargo bench --manifest-path "$root/Cargo.toml" --bench kernels --bench stages -- --quiet
