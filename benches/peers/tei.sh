#!/usr/bin/env bash
# Builds the router of text-embeddings-inference from a checkout of its repository, with the ONNX backend like
# its CPU image, and prints the path of the router: the value of TEI for benches/engine.sh.
#
#   benches/peers/tei.sh CHECKOUT
#
# Git dependencies (Candle with patches, for GPUs; insta, for tests) are replaced by their releases on
# crates.io. ONNX Runtime's library is the one of the peers' Python packages.
set -euo pipefail
checkout=$1
root=$(cd "$(dirname "$0")/../.." && pwd)
build=${CARGO_TARGET_DIR:-$root/target}/tei
libraries=$build/lib
mkdir -p "$libraries"
if [ ! -e "$build/src" ]; then
  git clone -q "$checkout" "$build/src"
fi
onnxruntime=$(echo "$root"/.cache/peers/lib/python3*/site-packages/onnxruntime/capi/libonnxruntime.so.*)
for name in "$(basename "$onnxruntime")" libonnxruntime.so.1 libonnxruntime.so; do
  ln -sf "$onnxruntime" "$libraries/$name"
done
cd "$build/src"
rm -f rust-toolchain.toml
sed -i '/^\[patch.crates-io\]/,/^\[profile/{/^\[profile/!d}' Cargo.toml
sed -i 's/^insta = { git.*/insta = "1"/; s#/_cuda"#/cuda"#g; s#/_mkl"#/mkl"#g; s#"cudarc?/[a-z]*-linking", ##' \
  router/Cargo.toml core/Cargo.toml backends/*/Cargo.toml
# Removes git dependencies from the lock file.
python3 - <<'PYTHON'
import pathlib
lock = pathlib.Path("Cargo.lock")
packages = lock.read_text().split("\n[[package]]\n")
lock.write_text("\n[[package]]\n".join(p for p in packages if 'source = "git+' not in p))
PYTHON
export ORT_LIB_LOCATION=$libraries ORT_PREFER_DYNAMIC_LINK=1 RUSTFLAGS="-C link-arg=-Wl,-rpath,$libraries"
cargo build --release --target-dir target -p text-embeddings-router --no-default-features --features ort,http >&2
echo "$build/src/target/release/text-embeddings-router"
