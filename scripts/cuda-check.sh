#!/usr/bin/env bash
# Compiles, links and starts kandle with --features cuda on a machine without a GPU or CUDA.
#
# The toolkit comes from PyPI into .cache/cuda. The driver's library (libcuda.so.1) is on no machine
# without a driver, so the link is against a stub with one empty function for each symbol that the
# build asks for; on a machine with a GPU the real one takes its place.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cache=$root/.cache/cuda
target=${CARGO_TARGET_DIR:-$root/target}/cuda
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-90}
python=${PYTHON:-python3}

if [ ! -e "$cache/.complete" ]; then
  "$python" -m venv "$cache"
  "$cache/bin/pip" install -q \
    'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-cccl==13.0.*' 'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-nvrtc==13.0.*' \
    'nvidia-cuda-crt==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cublas==13.*' 'nvidia-curand==10.4.*'
  touch "$cache/.complete"
fi
CUDA_HOME=$(echo "$cache"/lib/python3*/site-packages/nvidia/cu13)
export CUDA_HOME CUDA_PATH=$CUDA_HOME CUDA_ROOT=$CUDA_HOME PATH="$CUDA_HOME/bin:$PATH"
[ -e "$CUDA_HOME/lib64" ] || ln -s lib "$CUDA_HOME/lib64"
for library in "$CUDA_HOME"/lib/*.so.*; do
  link=${library%%.so.*}.so
  [ -e "$link" ] || ln -s "$(basename "$library")" "$link"
done

stub=$cache/stub
mkdir -p "$stub"
export LIBRARY_PATH="$stub:$CUDA_HOME/lib" LD_LIBRARY_PATH="$stub:$CUDA_HOME/lib"
cargo build --manifest-path "$root/Cargo.toml" --target-dir "$target" --features cuda --lib
# Names of the driver's functions: cuInit, cuMemAlloc_v2, …; not cublas… or curand….
find "$target/debug/deps" -name '*.rlib' -exec nm -u {} + 2>/dev/null |
  sed -n 's/^ *U \(cu[A-Z][A-Za-z0-9_]*\)$/\1/p' | sort -u > "$stub/symbols"
awk 'BEGIN { print "/* made by scripts/cuda-check.sh */" } { print "int " $1 "(void) { return 100; /* CUDA_ERROR_NO_DEVICE */ }" }' \
  "$stub/symbols" > "$stub/cuda.c"
cc -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$stub/libcuda.so.1" "$stub/cuda.c"
ln -sf libcuda.so.1 "$stub/libcuda.so"
cargo build --manifest-path "$root/Cargo.toml" --target-dir "$target" --features cuda
echo "linked: $(du -h "$target/debug/kandle" | cut -f1), $(wc -l < "$stub/symbols") driver symbols"

# It starts, says that there is no device where one is asked for, and takes the CPU where it may choose.
settings=(--set kafka.brokers=none:1 --set input.topics=a --set input.group=b --set input.format=text
  --set task.kind=text-classification --set model.source=bundled --set output.topic=c --set dead_letters.topic=d)
if said=$(echo hello | "$target/debug/kandle" predict "${settings[@]}" --set model.device=cuda 2>&1); then
  echo "a CUDA device answered:" && echo "$said" | tail -1
else
  echo "$said" | grep 'CUDA device 0 cannot be used'
fi
echo "My parcel never arrived" | "$target/debug/kandle" predict "${settings[@]}" | grep '"label":"shipping"'
echo "cuda-check passed"
