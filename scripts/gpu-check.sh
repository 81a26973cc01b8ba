#!/usr/bin/env bash
# On a machine with a GPU: the golden tests on the device, then the engine on it and on the CPU over the
# same texts, how near the two are, how fast, and what share of a large multiplication's rate the device reached;
# the result as JSON on standard output.
#
#   scripts/gpu-check.sh build          here, without a GPU: binaries and CUDA's libraries to target/gpu-check
#   scripts/gpu-check.sh run [FOLDER]   there: FOLDER holds models and texts of benches/peers/make.py
#
# Without FOLDER the bundled model and its tickets serve. DEVICE=cpu runs the same on a CPU.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
out=$target/gpu-check
device=${DEVICE:-cuda}

build() {
  "$root/scripts/cuda-check.sh" >&2
  . "$root/scripts/cuda-env.sh"
  mkdir -p "$out/lib" "$out/stub"
  cargo build --release --manifest-path "$root/Cargo.toml" --target-dir "$target/cuda" --features cuda
  golden=$(cargo test --release --manifest-path "$root/Cargo.toml" --target-dir "$target/cuda" --features cuda --test golden \
    --no-run --message-format=json | sed -n 's/.*"executable":"\([^"]*golden-[^"]*\)".*/\1/p' | tail -1)
  strip -o "$out/kandle" "$target/cuda/release/kandle"
  strip -o "$out/golden" "$golden"
  # Where there is no driver, DEVICE=cpu runs beside this.
  cp "$stub/libcuda.so.1" "$out/stub/"
  cp -L "$CUDA_HOME"/lib/lib{cudart,cublas,cublasLt,curand,nvrtc}.so.[0-9]* "$out/lib/"
  echo "built: $out ($(du -sh "$out" | cut -f1))" >&2
}

measure() { # MODEL TEXTS DEVICE [--output FILE]
  "$out/kandle" bench engine --json --model "$1" --input "$2" --device "$3" --rounds 3 "${@:4}" 2>> "$out/log"
}

run() {
  folder=${1:-}
  [ "$device" != cpu ] || export LD_LIBRARY_PATH="$out/stub${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
  export LD_LIBRARY_PATH="$out/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
  : > "$out/log"
  (cd "$root" && KANDLE_TEST_DEVICE=$device "$out/golden") >&2
  if [ -n "$folder" ]; then
    cases=("minilm mixed" "minilm long" "base mixed" "base long" "modernbert long")
  else
    cases=("bundled tickets")
  fi
  echo "["
  separator=
  for case in "${cases[@]}"; do
    read -r model texts <<< "$case"
    [ -n "$folder" ] && { path=$folder/$model; input=$folder/$texts.jsonl; } || { path=$model; input=$root/demo/tickets.jsonl; }
    there=$(measure "$path" "$input" "$device" --output "$out/device.jsonl")
    here=$(measure "$path" "$input" cpu --output "$out/cpu.jsonl")
    # The embeddings have length 1 or not: the cosine does not care.
    least=$(paste -d '\n' "$out/device.jsonl" "$out/cpu.jsonl" | sed 's/^{"embedding":\[//; s/\]}$//' | awk -F, '
      NR % 2 { split($0, a, ","); next }
      { ab = aa = bb = 0; for (i = 1; i <= NF; i++) { ab += a[i] * $i; aa += a[i] * a[i]; bb += $i * $i }
        c = ab / sqrt(aa * bb); if (least == "" || c < least) least = c }
      END { printf "%.6f", least }')
    echo "$separator{\"model\": \"$model\", \"texts\": \"$texts\", \"least_cosine\": $least, \"device\": $there, \"cpu\": $here}"
    separator=,
  done
  # More than fits: halved until it does.
  if [ -n "$folder" ] && [ "$device" != cpu ]; then
    for i in $(seq 60); do sed "s/\"text\": \"/&$i /" "$folder/long.jsonl"; done > "$out/many.jsonl"
    there=$(measure "$folder/base" "$out/many.jsonl" "$device" --window 18000 --set batch.max_tokens=10000000)
    echo ", {\"model\": \"base\", \"texts\": \"many\", \"device\": $there}"
  fi
  echo "]"
}

case "${1:-}" in
  build) build ;;
  run) run "${2:-}" ;;
  *) sed -n '2,9p' "$0"; exit 2 ;;
esac
