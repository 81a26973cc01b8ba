#!/usr/bin/env bash
# Builds kandle for 64-bit Arm and runs its unit and golden tests, on other machines under emulation (qemu): first on a
# core with the int8 dot product instructions, then on one without.
#
# Needs the target's standard library (rustup target add aarch64-unknown-linux-gnu, or Debian's
# libstd-rust-dev:arm64). On machines that are not Arm it also needs g++-aarch64-linux-gnu and qemu-user.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
target=aarch64-unknown-linux-gnu
cross=aarch64-linux-gnu
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$root/target}/arm
if [ "$(uname -m)" != aarch64 ]; then
  for tool in "$cross-gcc" "$cross-g++" qemu-aarch64; do
    command -v "$tool" > /dev/null || { echo "$tool is missing: apt-get install g++-$cross qemu-user" >&2; exit 1; }
  done
  export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=$cross-gcc
  export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/$cross"
  # librdkafka's configure only reads CC, CXX and AR. Build scripts run on this machine, with the host's compilers.
  export CC=$cross-gcc CXX=$cross-g++ AR=$cross-ar
  export HOST_CC=gcc HOST_CXX=g++
fi
cd "$root"
for core in max cortex-a72; do
  echo "testing on core $core"
  QEMU_CPU=$core cargo test --target "$target" --workspace --lib --test golden
done
echo "arm-check passed"
