# Source this with $root set: installs the CUDA toolkit from PyPI into .cache/cuda and sets the build environment.
cuda=$root/.cache/cuda
stub=$cuda/stub
if [ ! -e "$cuda/.complete" ]; then
  "${PYTHON:-python3}" -m venv "$cuda"
  "$cuda/bin/pip" install -q \
    'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-cccl==13.0.*' 'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-nvrtc==13.0.*' \
    'nvidia-cuda-crt==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cublas==13.*' 'nvidia-curand==10.4.*'
  touch "$cuda/.complete"
fi
mkdir -p "$stub"
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-90}
CUDA_HOME=$(echo "$cuda"/lib/python3*/site-packages/nvidia/cu13)
export CUDA_HOME CUDA_PATH=$CUDA_HOME CUDA_ROOT=$CUDA_HOME PATH="$CUDA_HOME/bin:$PATH"
export LIBRARY_PATH="$stub:$CUDA_HOME/lib" LD_LIBRARY_PATH="$stub:$CUDA_HOME/lib"
[ -e "$CUDA_HOME/lib64" ] || ln -s lib "$CUDA_HOME/lib64"
for library in "$CUDA_HOME"/lib/*.so.*; do
  link=${library%%.so.*}.so
  [ -e "$link" ] || ln -s "$(basename "$library")" "$link"
done

# Linking needs the driver's library, which is missing on machines without a driver. This builds a stub of it, with an
# empty function for each driver symbol that the built libraries use (cuInit, cuMemAlloc_v2, …; not cublas… or curand…).
driver_stub() { # FOLDER of the built *.rlib
  find "$1" -name '*.rlib' -exec nm -u {} + 2>/dev/null |
    sed -n 's/^ *U \(cu[A-Z][A-Za-z0-9_]*\)$/\1/p' | sort -u > "$stub/symbols"
  awk 'BEGIN { print "/* made by scripts/cuda-env.sh */" } { print "int " $1 "(void) { return 100; /* CUDA_ERROR_NO_DEVICE */ }" }' \
    "$stub/symbols" > "$stub/cuda.c"
  cc -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$stub/libcuda.so.1" "$stub/cuda.c"
  ln -sf libcuda.so.1 "$stub/libcuda.so"
}
