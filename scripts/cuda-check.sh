#!/usr/bin/env bash
# Compiles, links and starts kandle with --features cuda on a machine without a GPU or CUDA.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}/cuda
. "$root/scripts/cuda-env.sh"

cargo build --manifest-path "$root/Cargo.toml" --target-dir "$target" --features cuda --lib
driver_stub "$target/debug/deps"
cargo build --manifest-path "$root/Cargo.toml" --target-dir "$target" --features cuda
echo "linked: $(du -h "$target/debug/kandle" | cut -f1), $(wc -l < "$stub/symbols") driver symbols"

# Without a GPU, kandle has to report the missing device if CUDA is required, and to use the CPU if it may choose.
settings=(--set kafka.brokers=none:1 --set input.topics=a --set input.group=b --set input.format=text
  --set task.kind=text-classification --set model.source=bundled --set output.topic=c --set dead_letters.topic=d)
if said=$(echo hello | "$target/debug/kandle" predict "${settings[@]}" --set model.device=cuda 2>&1); then
  echo "a CUDA device answered:" && echo "$said" | tail -1
else
  echo "$said" | grep 'CUDA device 0 cannot be used'
fi
echo "My parcel never arrived" | "$target/debug/kandle" predict "${settings[@]}" | grep '"label":"shipping"'
echo "cuda-check passed"
