#!/usr/bin/env bash
# Tests and measures the engine on a GPU: each kernel against a CPU, every architecture and task in f32, bf16 and f16, the
# cosine of its embeddings to a CPU's, its speed, the share of a large matrix multiplication's rate that it reaches, and
# sentence-transformers for comparison.
#
#   scripts/gpu-check.sh build            on any machine: puts binaries and CUDA's libraries into target/gpu-check, and the
#                                         binaries packed into target/gpu-check/carry.tar.xz, which is all that a machine
#                                         with PyTorch needs: python3 -m tarfile -e carry.tar.xz target/gpu-check
#   scripts/gpu-check.sh test             on the GPU machine: the tests alone
#   scripts/gpu-check.sh run [FOLDER]     on the GPU machine: the tests, then what was measured; FOLDER holds models and
#                                         texts of benches/peers/make.py
#   scripts/gpu-check.sh profile FOLDER   on the GPU machine: the device's time per kernel (Nsight Compute's ncu)
#
# Prints JSON lines to standard output. Without FOLDER it uses the bundled model and its tickets. DEVICE=cpu runs the same
# on a CPU, without the kernels. CASES selects what to measure: "MODEL TEXTS DTYPE", separated by commas. PEERS=yes adds
# sentence-transformers, which takes longer than all else. PROFILE=dev builds faster, to try this script on a CPU.
# CUDA's libraries are looked up where `build` put them, then in python3's packages.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
out=${GPU_CHECK:-$target/gpu-check}
device=${DEVICE:-cuda}
profile=${PROFILE:-release}

build() {
  . "$root/scripts/cuda-env.sh"
  mkdir -p "$out/lib" "$out/stub"
  options=(--profile "$profile" --manifest-path "$root/Cargo.toml" --target-dir "$target/cuda" --features cuda)
  local built=$target/cuda/${profile/dev/debug}
  cargo build "${options[@]}" --lib
  driver_stub "$built/deps"
  cargo build "${options[@]}"
  strip -o "$out/kandle" "$built/kandle"
  test_binary gpu --test gpu
  test_binary kernels --package kandle-kernels --lib
  # For DEVICE=cpu on machines without a driver.
  cp "$stub/libcuda.so.1" "$out/stub/"
  cp -L "$CUDA_HOME"/lib/lib{cudart,cublas,cublasLt,curand,nvrtc}.so.[0-9]* "$out/lib/"
  # The binaries have much in common, which a dictionary as large as all of them finds.
  tar -C "$out" -c kandle gpu kernels | xz --lzma2=preset=6,dict=128MiB > "$out/carry.tar.xz"
  echo "built: $out ($(du -sh "$out" | cut -f1)), to carry: $(du -h "$out/carry.tar.xz" | cut -f1)" >&2
}

test_binary() { # NAME, and what selects it
  strip -o "$out/$1" "$(cargo test "${options[@]}" "${@:2}" --no-run --message-format=json |
    sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -1)"
}

# Finds the libraries that kandle links to: those from `build`, or those of a Python with PyTorch.
libraries() {
  local folders
  folders=$(python3 -c 'import glob, site, sys; print(":".join(p for s in site.getsitepackages() for p in glob.glob(s + "/nvidia/*/lib")))' 2>/dev/null || true)
  [ "$device" != cpu ] || folders=$out/stub:$folders
  export LD_LIBRARY_PATH="$out/lib:$folders${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
  work=$(mktemp -d)
  touch "$work/log"
  trap 'status=$?; [ $status = 0 ] || cat "$work/log" >&2; rm -rf "$work"' EXIT
}

measure() { # MODEL TEXTS DEVICE DTYPE [OPTION…]
  "$out/kandle" bench engine --json --model "$1" --input "$2" --device "$3" --dtype "$4" "${@:5}" 2>> "$work/log" | tr -d '\n'
}

# Repeats each text, with two letters put before it. A GPU would finish the files made for CPUs before its clock settles.
enlarge() { # FILE TIMES
  awk -v times="$2" '{ line[NR] = $0 } END { for (i = 0; i < times; i++) for (n = 1; n <= NR; n++) {
    text = line[n]; sub(/"text": "/, sprintf("&%c %c ", 97 + i % 26, 97 + int(i / 26)), text); print text } }' "$1"
}

# The lowest cosine between the embeddings of two files, normalised or not.
least_cosine() {
  paste -d '\n' "$1" "$2" | sed 's/^{"embedding":\[//; s/\]}$//' | awk -F, '
    NR % 2 { split($0, a, ","); next }
    { ab = aa = bb = 0; for (i = 1; i <= NF; i++) { ab += a[i] * $i; aa += a[i] * a[i]; bb += $i * $i }
      c = ab / sqrt(aa * bb); if (least == "" || c < least) least = c }
    END { printf "%.6f", least }'
}

inputs() { # FOLDER MODEL TEXTS: sets path and texts, and makes the larger file
  path=$1/$2 texts=$1/$3.jsonl
  [ -n "$1" ] || path=$2 texts=$root/demo/$3.jsonl
  large=$work/$3.large.jsonl
  # About two million tokens, of seven bytes each.
  [ -e "$large" ] || enlarge "$texts" $((14000000 / $(wc -c < "$texts") + 1)) > "$large"
}

check() {
  libraries
  cd "$root"
  export CARGO_MANIFEST_DIR=$root KANDLE_TEST_DEVICE=$device
  if [ "$device" != cpu ]; then
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader >&2
    "$out/kernels" --ignored tests::device >&2
  fi
  "$out/gpu" >&2
  echo "gpu-check: the tests passed on $device" >&2
}

run() {
  folder=${1:+$(realpath "$1")}
  check
  default="bundled tickets auto"
  [ -z "$folder" ] || default="qwen3 long bf16,gemma long bf16,deberta long bf16,deberta long f16,minilm mixed bf16,minilm long bf16,base mixed bf16,base long bf16,base long f16,base long f32,modernbert long bf16,large long bf16"
  IFS=, read -ra cases <<< "${CASES:-$default}"
  for case in "${cases[@]}"; do
    read -r model name dtype <<< "$case"
    inputs "$folder" "$model" "$name"
    head -64 "$texts" > "$work/few.jsonl"
    measure "$path" "$work/few.jsonl" "$device" "$dtype" --output "$work/there.jsonl" > /dev/null
    [ -e "$work/$model.$name.cpu" ] || measure "$path" "$work/few.jsonl" cpu f32 --output "$work/$model.$name.cpu" > /dev/null
    nearest=$(least_cosine "$work/there.jsonl" "$work/$model.$name.cpu")
    there=$(measure "$path" "$large" "$device" "$dtype" --rounds 5)
    echo "{\"model\": \"$model\", \"texts\": \"$name\", \"dtype\": \"$dtype\", \"least_cosine\": $nearest, \"kandle\": $there}"
    if [ "${PEERS:-no}" = yes ] && [ "$device" != cpu ] && [ -n "$folder" ]; then
      peer=$(python3 "$root/benches/peers/peer.py" torch "$dtype" --device cuda --model "$path" --input "$large" --threads "$(nproc)" 2>> "$work/log")
      echo "{\"model\": \"$model\", \"texts\": \"$name\", \"dtype\": \"$dtype\", \"sentence_transformers\": $peer}"
    fi
  done
  # Batches that do not fit the device's memory: they have to be halved until they do.
  if [ -n "$folder" ] && [ "$device" != cpu ] && [ -z "${CASES:-}" ]; then
    enlarge "$folder/long.jsonl" 200 > "$work/many.jsonl"
    there=$(measure "$folder/base" "$work/many.jsonl" "$device" bf16 --window 60000 --set batch.max_tokens=20000000)
    echo "{\"model\": \"base\", \"texts\": \"many, in one batch where that fits\", \"kandle\": $there}"
  fi
}

profile() {
  libraries
  for case in "base long bf16" "minilm mixed bf16"; do
    read -r model name dtype <<< "$case"
    inputs "$1" "$model" "$name"
    ncu --clock-control none --metrics gpu__time_duration.sum --csv --log-file "$work/ncu.csv" --launch-skip 800 --launch-count 800 \
      "$out/kandle" bench engine --json --model "$path" --input "$large" --device "$device" --dtype "$dtype" 2>> "$work/log" > /dev/null
    echo "$case"
    python3 "$root/benches/peers/kernels.py" "$work/ncu.csv"
  done
}

case "${1:-}" in
  build) build ;;
  test) check ;;
  run) run "${2:-}" ;;
  profile) profile "${2:?a folder of benches/peers/make.py}" ;;
  *) sed -n '2,17p' "$0"; exit 2 ;;
esac
